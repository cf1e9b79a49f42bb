"""A container's state follows from its facts; a change of facts is a pure function."""

import pytest

from oci.errors import FailedPrecondition
from oci.status import (
    ContainerState,
    ContainerStatus,
    with_creation,
    with_exit,
    with_failed_start,
    with_lost_exit,
    with_start,
)

CREATED = with_creation(ContainerStatus(), 10, 42, 4200)


def test_the_state_follows_from_the_facts() -> None:
    running = with_start(CREATED, 20)
    exited = with_exit(running, 30, 0)

    states = [each.state for each in (ContainerStatus(), CREATED, running, exited)]

    assert states == [
        ContainerState.CREATING,
        ContainerState.CREATED,
        ContainerState.RUNNING,
        ContainerState.EXITED,
    ]


@pytest.mark.parametrize("status", [ContainerStatus(), with_start(CREATED, 20), with_exit(CREATED, 30, 0)])
def test_only_a_created_container_starts(status: ContainerStatus) -> None:
    with pytest.raises(FailedPrecondition, match=f"cannot start a container that is {status.state}"):
        with_start(status, 40)


@pytest.mark.parametrize(
    ("exit_code", "oom_killed", "reason"),
    [(0, False, "Completed"), (3, False, "Error"), (137, True, "OOMKilled"), (0, True, "OOMKilled")],
)
def test_the_reason_of_an_exit_is_the_cris_word(exit_code: int, oom_killed: bool, reason: str) -> None:
    ended = with_exit(with_start(CREATED, 20), 30, exit_code, oom_killed)

    assert (ended.reason, ended.exit_code, ended.finished_at) == (reason, exit_code, 30)


def test_the_first_known_end_stands() -> None:
    failed = with_failed_start(CREATED, 20, "exec: not found")

    assert with_exit(failed, 30, 137) == failed
    assert with_lost_exit(failed, 30, "MonitorLost", "") == failed
    assert (failed.state, failed.exit_code, failed.reason) == (ContainerState.EXITED, 128, "StartError")
