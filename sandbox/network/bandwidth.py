"""Turns the bandwidth annotations of a pod into the argument of CNI's bandwidth capability.

Sources: Kubernetes, "Support traffic shaping" (kubernetes.io/{ingress,egress}-bandwidth); CNI's CONVENTIONS.md.
"""

import re
from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal

from oci.errors import InvalidArgument

DIRECTIONS = ("ingress", "egress")
SUFFIXES = {
    **{"n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1)},
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate("kMGTPE", 1)},
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", 1)},
}
QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:[eE]([+-]?\d{1,3})|([numkMGTPE]|[KMGTPE]i)?)")
LOWEST, HIGHEST = 10**3, 10**15  # bits per second; what the kubelet's own traffic shaping accepts
# The plugin refuses a burst of 4 GiB and more (in bits).
HIGHEST_BURST_BITS = 2**32 - 1


def capability(annotations: Mapping[str, str]) -> dict[str, int] | None:
    """Rates in bits per second and bursts in bits; None where the pod asks for no limit.

    The burst is one second's worth of the rate: enough for the rate to be reached, short enough for it to be felt.
    Raises InvalidArgument naming the annotation.
    """
    argument: dict[str, int] = {}
    for direction in DIRECTIONS:
        key = f"kubernetes.io/{direction}-bandwidth"
        if key not in annotations:
            continue
        rate = parse_quantity(annotations[key])
        if rate is None or not LOWEST <= rate <= HIGHEST:
            raise InvalidArgument(
                f'annotation {key} is "{annotations[key]}"; expected a quantity from 1k to 1P (bits/s)'
            )
        argument[f"{direction}Rate"] = rate
        argument[f"{direction}Burst"] = min(rate, HIGHEST_BURST_BITS)
    return argument or None


def parse_quantity(text: str) -> int | None:
    """A Kubernetes quantity ("10M", "1.5Gi", "1e6"), rounded up to an integer; None if it is not one."""
    match = QUANTITY.fullmatch(text)
    if match is None:
        return None
    number, exponent, suffix = match.groups()
    scale = Decimal(10) ** int(exponent) if exponent else SUFFIXES[suffix or ""]
    return int((Decimal(number) * scale).to_integral_value(ROUND_CEILING))
