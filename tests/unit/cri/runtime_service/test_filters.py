from dataclasses import replace

import pytest

from cri.api.runtime.v1 import api_pb2 as api
from cri.runtime_service import filters
from oci.container import ContainerRecord
from oci.container_spec import ContainerId, ContainerSpec, SandboxId
from oci.status import ContainerStatus
from sandbox.sandbox import SandboxRecord
from sandbox.spec import SandboxSpec

LABELS = {"app": "web", "tier": "front"}

SANDBOX = SandboxRecord(
    id=SandboxId("a1b2"),
    spec=SandboxSpec("pod", "uid", "namespace", labels=LABELS),
    runtime_handler="crun",
    hostname="",
    cgroup_parent="/",
    owns_cgroup_parent=False,
    requested_at=1,
    ready_at=2,
)
CONTAINER = ContainerRecord(
    id=ContainerId("c3d4"),
    sandbox_id=SANDBOX.id,
    spec=ContainerSpec("web", labels=LABELS),
    image_id="sha256:1",
    image_ref="sha256:1",
    image_mounts=(),
    runtime_handler="crun",
    log_path="",
    cgroup_parent="/",
    stop_signal="SIGTERM",
    rootfs="",
    requested_at=1,
    status=ContainerStatus(created_at=1, started_at=2),
)


@pytest.mark.parametrize(
    "passing",
    [
        {},
        {"id": "a1b2"},
        {"id": "a1"},
        {"label_selector": {"app": "web"}},
        {"label_selector": LABELS},
        {"id": "a", "label_selector": {"tier": "front"}},
    ],
)
def test_what_all_conditions_hold_for_passes(passing: dict[str, object]) -> None:
    of_container = {"pod_sandbox_id" if name == "id" else name: passing[name] for name in passing}

    assert filters.sandbox_passes(SANDBOX, api.PodSandboxFilter(**passing))  # type: ignore[arg-type]
    assert filters.sandbox_stats_passes(SANDBOX, api.PodSandboxStatsFilter(**passing))  # type: ignore[arg-type]
    assert filters.container_passes(CONTAINER, api.ContainerFilter(**of_container))  # type: ignore[arg-type]
    assert filters.container_stats_passes(CONTAINER, api.ContainerStatsFilter(**of_container))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "failing",
    [
        {"id": "b1"},
        {"id": "a1b2c"},
        {"label_selector": {"app": "db"}},
        {"label_selector": {**LABELS, "more": ""}},
        {"id": "a1b2", "label_selector": {"app": "db"}},
    ],
)
def test_what_one_condition_does_not_hold_for_is_left_out(failing: dict[str, object]) -> None:
    of_container = {"pod_sandbox_id" if name == "id" else name: failing[name] for name in failing}

    assert not filters.sandbox_passes(SANDBOX, api.PodSandboxFilter(**failing))  # type: ignore[arg-type]
    assert not filters.sandbox_stats_passes(SANDBOX, api.PodSandboxStatsFilter(**failing))  # type: ignore[arg-type]
    assert not filters.container_passes(CONTAINER, api.ContainerFilter(**of_container))  # type: ignore[arg-type]
    assert not filters.container_stats_passes(
        CONTAINER,
        api.ContainerStatsFilter(**of_container),  # type: ignore[arg-type]
    )


def test_a_container_is_found_by_its_own_id_and_by_its_pod_s_together() -> None:
    both = api.ContainerFilter(id="c3", pod_sandbox_id="a1")
    other_pod = api.ContainerFilter(id="c3", pod_sandbox_id="ff")

    assert filters.container_passes(CONTAINER, both)
    assert not filters.container_passes(CONTAINER, other_pod)
    assert filters.container_stats_passes(CONTAINER, api.ContainerStatsFilter(id="c3", pod_sandbox_id="a1"))
    assert not filters.container_stats_passes(CONTAINER, api.ContainerStatsFilter(id="ff", pod_sandbox_id="a1"))


def test_states_are_told_apart_also_those_whose_number_is_0() -> None:
    ready = api.PodSandboxFilter(state=api.PodSandboxStateValue(state=api.SANDBOX_READY))
    not_ready = api.PodSandboxFilter(state=api.PodSandboxStateValue(state=api.SANDBOX_NOTREADY))
    created = api.ContainerFilter(state=api.ContainerStateValue(state=api.CONTAINER_CREATED))
    running = api.ContainerFilter(state=api.ContainerStateValue(state=api.CONTAINER_RUNNING))
    stopped = replace(SANDBOX, stopped_at=3)
    not_started = replace(CONTAINER, status=ContainerStatus(created_at=1))

    assert [filters.sandbox_passes(each, ready) for each in (SANDBOX, stopped)] == [True, False]
    assert [filters.sandbox_passes(each, not_ready) for each in (SANDBOX, stopped)] == [False, True]
    assert [filters.container_passes(each, created) for each in (CONTAINER, not_started)] == [False, True]
    assert [filters.container_passes(each, running) for each in (CONTAINER, not_started)] == [True, False]
