"""The OCI runtimes of configured handlers."""

from pathlib import Path

import pytest

from cri import daemon
from cri.config import RuntimeHandler
from cri.runtimes import runtime_of
from oci.errors import InvalidArgument
from oci.linux.cgroup import Driver


def test_arguments_precede_every_command_and_options_only_those_that_make_containers() -> None:
    settings = RuntimeHandler(path=Path("/bin/rt"), root=Path("/unused"), runtime_args=("--config=/x",), no_pivot=True)

    runtime = runtime_of("rt", settings, Path("/state"), Driver.CGROUPFS)

    assert runtime.argv == ("/bin/rt", "--root", "/state", "--log-format", "json", "--config=/x")
    assert runtime.create_options == ("--no-pivot",)
    plain = runtime_of("rt", RuntimeHandler(path=Path("/bin/rt"), root=Path("/s")), Path("/s"), Driver.CGROUPFS)
    assert plain.create_options == ()


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_seccomp_profile_that_cannot_be_read_stops_the_start_by_its_key(tmp_path: Path, text: str | None) -> None:
    profile = tmp_path / "profile.json"
    if text is not None:
        profile.write_text(text)

    with pytest.raises(InvalidArgument, match=r"runtime\.handlers\.x\.seccomp_profile .*profile\.json"):
        daemon._seccomp(profile, "runtime.handlers.x.seccomp_profile")
    assert daemon._seccomp(None, "any") is None
