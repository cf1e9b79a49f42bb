import pytest

from oci.container_spec import Capabilities
from oci.errors import FailedPrecondition, InvalidArgument
from oci.linux import caps

ALL = frozenset(caps.NAMES)


def test_the_names_are_in_the_order_of_their_numbers() -> None:
    assert caps.from_mask(1) == {"CHOWN"}
    assert caps.from_mask(1 << 21 | 1 << 40 | 1 << 60) == {"SYS_ADMIN", "CHECKPOINT_RESTORE"}
    assert len(caps.NAMES) == 41


def test_own_capabilities_are_read() -> None:
    assert caps.own("CapEff") <= caps.own("CapBnd") | caps.own("CapEff")
    assert caps.own("NoSuchField") == frozenset()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Capabilities(), set(caps.DEFAULT)),
        (Capabilities(add=("NET_RAW",)), {*caps.DEFAULT, "NET_RAW"}),
        (Capabilities(add=("cap_net_raw",), drop=("chown",)), ({*caps.DEFAULT} - {"CHOWN"}) | {"NET_RAW"}),
        (Capabilities(add=("ALL",)), set(caps.NAMES)),
        (Capabilities(drop=("ALL",)), set()),
        (Capabilities(add=("NET_RAW",), drop=("ALL",)), {"NET_RAW"}),
        (Capabilities(add=("ALL",), drop=("SYS_ADMIN",)), set(caps.NAMES) - {"SYS_ADMIN"}),
        (Capabilities(add=("NET_RAW",), drop=("NET_RAW",)), set(caps.DEFAULT)),
    ],
)
def test_what_is_added_and_dropped(wanted: Capabilities, expected: set[str]) -> None:
    assert caps.granted(wanted, ALL) == expected


def test_all_means_as_many_as_this_host_has() -> None:
    assert caps.granted(Capabilities(add=("ALL",)), ALL - {"SYS_RESOURCE"}) == ALL - {"SYS_RESOURCE"}
    assert "KILL" not in caps.granted(Capabilities(), ALL - {"KILL"})


def test_one_by_name_that_this_host_lacks_is_an_error() -> None:
    with pytest.raises(FailedPrecondition, match="SYS_RESOURCE"):
        caps.granted(Capabilities(add=("SYS_RESOURCE",)), ALL - {"SYS_RESOURCE"})


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="'FLY'"):
        caps.granted(Capabilities(add=("FLY",)), ALL)


def test_ambient_ones_are_in_every_set_and_others_are_not_inheritable() -> None:
    sets = caps.sets(Capabilities(drop=("ALL",), add=("CHOWN",), add_ambient=("NET_RAW",)), ALL)

    assert sets == {
        "bounding": ["CAP_CHOWN", "CAP_NET_RAW"],
        "effective": ["CAP_CHOWN", "CAP_NET_RAW"],
        "permitted": ["CAP_CHOWN", "CAP_NET_RAW"],
        "inheritable": ["CAP_NET_RAW"],
        "ambient": ["CAP_NET_RAW"],
    }
