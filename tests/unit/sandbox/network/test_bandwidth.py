import pytest

from oci.errors import InvalidArgument
from sandbox.network.bandwidth import capability, parse_quantity

INGRESS, EGRESS = "kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"


def test_a_pod_without_annotations_has_no_limit() -> None:
    assert capability({"other": "10M"}) is None


def test_rates_are_bits_per_second_and_a_burst_is_a_second_of_the_rate() -> None:
    assert capability({INGRESS: "10M", EGRESS: "1Mi"}) == {
        "ingressRate": 10_000_000,
        "ingressBurst": 10_000_000,
        "egressRate": 1 << 20,
        "egressBurst": 1 << 20,
    }


def test_the_burst_stays_below_what_the_plugin_refuses() -> None:
    assert capability({EGRESS: "100G"}) == {"egressRate": 100_000_000_000, "egressBurst": 2**32 - 1}


@pytest.mark.parametrize("text", ["", "fast", "10MB", "-1M", "999", "2P", "1e99"])
def test_a_wrong_annotation_is_named_with_its_value(text: str) -> None:
    with pytest.raises(InvalidArgument, match=INGRESS) as error:
        capability({INGRESS: text})

    assert f'"{text}"' in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1k", 1000), ("1.5k", 1500), (".5Ki", 512), ("1e6", 10**6), ("1E", 10**18), ("1E3", 1000), ("1m", 1), ("+2", 2)],
)
def test_a_quantity_is_read_as_kubernetes_reads_it(text: str, value: int) -> None:
    assert parse_quantity(text) == value
