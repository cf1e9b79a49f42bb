"""What the CRI's list filters let through. All given conditions must hold; an id may be a prefix. Pure."""

from collections.abc import Mapping

from cri.api.runtime.v1 import api_pb2 as api
from cri.runtime_service import to_cri
from oci.container import ContainerRecord
from sandbox.sandbox import SandboxRecord


def has_labels(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in selector.items())


def sandbox_passes(record: SandboxRecord, wanted: api.PodSandboxFilter) -> bool:
    return (
        record.id.startswith(wanted.id)
        and (not wanted.HasField("state") or to_cri.sandbox_state(record.state) == wanted.state.state)
        and has_labels(record.spec.labels, wanted.label_selector)
    )


def container_passes(record: ContainerRecord, wanted: api.ContainerFilter) -> bool:
    return (
        record.id.startswith(wanted.id)
        and record.sandbox_id.startswith(wanted.pod_sandbox_id)
        and (not wanted.HasField("state") or to_cri.container_state(record.state) == wanted.state.state)
        and has_labels(record.spec.labels, wanted.label_selector)
    )


def container_stats_passes(record: ContainerRecord, wanted: api.ContainerStatsFilter) -> bool:
    return (
        record.id.startswith(wanted.id)
        and record.sandbox_id.startswith(wanted.pod_sandbox_id)
        and has_labels(record.spec.labels, wanted.label_selector)
    )


def sandbox_stats_passes(record: SandboxRecord, wanted: api.PodSandboxStatsFilter) -> bool:
    return record.id.startswith(wanted.id) and has_labels(record.spec.labels, wanted.label_selector)
