"""Each field of a container does what the CRI says, and is told again."""

import json
import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from oci.linux import caps
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness.client import Client, Pod
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.images import Entry, busybox_image, image, layer
from tests.e2e.harness.inside import limit, output, pid_of
from tests.e2e.harness.ports import wait_until
from tests.e2e.harness.registry import Registry

FOR_EVER = ["sleep", "100000"]
HOST_IDS = 200_000
DENY_MKDIR = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
}
NEWER = {
    name: os.environ[f"CRITO_TEST_{name.upper()}"]
    for name in ("crun", "runc")
    if os.environ.get(f"CRITO_TEST_{name.upper()}")
}


@pytest.fixture(scope="module")
def shared_daemon(make_daemon: MakeDaemon, volume_image: str, entry_image: str) -> Daemon:
    """With the OCI runtimes that the environment names beside those of the host, and with the images of all tests."""
    handlers = {f"newer-{name}": {"path": path} for name, path in NEWER.items()}
    made = make_daemon({"runtime": {"handlers": handlers}} if handlers else None)
    client = made.client()
    for each in (volume_image, entry_image):
        client.pull(each)
    for handler in client.runtime.Status(pb.StatusRequest(), timeout=10).runtime_handlers:
        if handler.name:  # runtimes make it at their first container, and it stays
            (made.run_dir / "runtimes" / handler.name).mkdir(0o700, parents=True, exist_ok=True)
    return made


@pytest.fixture
def pod(client: Client) -> Pod:
    return client.run_pod("fields")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory on the node that containers with user namespaces can reach too."""
    for each in (tmp_path, *tmp_path.parents[:-2]):
        each.chmod(stat.S_IMODE(each.stat().st_mode) | 0o055)
    return tmp_path


def secure(**fields: object) -> pb.LinuxContainerConfig:
    return pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(**fields))  # type: ignore[arg-type]


def limited(**fields: object) -> pb.LinuxContainerConfig:
    return pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(**fields))  # type: ignore[arg-type]


def number(value: int) -> pb.Int64Value:
    return pb.Int64Value(value=value)


def running(client: Client, container_id: str) -> int:
    """The pid of a container that runs FOR_EVER, once it is no longer the OCI runtime that will become it."""
    pid = pid_of(client, container_id)
    command = Path(f"/proc/{pid}/cmdline")
    wait_until(lambda: command.read_bytes().split(b"\0")[0] == b"sleep", "the container's program runs", 10)
    return pid


def process_status(client: Client, container_id: str, field: str) -> str:
    """A field of /proc/PID/status of a container that runs FOR_EVER."""
    lines = Path(f"/proc/{running(client, container_id)}/status").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{field}:"))


def capabilities(client: Client, container_id: str, kind: str) -> set[str]:
    held = int(process_status(client, container_id, kind), 16)
    return {name for bit, name in enumerate(caps.NAMES) if held >> bit & 1}


def handler_with(client: Client, feature: str) -> str:
    """A runtime handler that can do it."""
    handlers = client.runtime.Status(pb.StatusRequest(), timeout=10).runtime_handlers
    for handler in handlers:
        if getattr(handler.features, feature):
            name: str = handler.name
            return name
    pytest.skip(f"no OCI runtime here has {feature} (CRITO_TEST_CRUN, CRITO_TEST_RUNC may name newer ones)")


# What it is, and what is told of it


def test_a_container_is_told_as_it_was_created(client: Client, busybox: str) -> None:
    pod = client.run_pod("told")
    labels, annotations = {"a": "b", "odd": " ü\n"}, {"c": "d", "empty": ""}
    image_id = client.images.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=busybox))).image.id
    before = time.time_ns()
    config = client.container_config(busybox, ["false"], "told", attempt=2, labels=labels, annotations=annotations)
    config.image.image = image_id  # as the kubelet asks for it
    config.image.annotations["image"] = "annotated"

    container_id = client.create(pod, config)

    listed, status = client.containers()[0], client.status(container_id)
    for each in (listed, status):
        assert each.id == container_id
        assert (each.metadata.name, each.metadata.attempt) == ("told", 2)
        assert each.state == pb.CONTAINER_CREATED
        assert before < each.created_at < time.time_ns()
        assert (each.image.image, each.image.user_specified_image) == (busybox, busybox)
        assert dict(each.image.annotations) == {"image": "annotated"}
        assert each.image_id == image_id
        assert "@sha256:" in each.image_ref
        assert (dict(each.labels), dict(each.annotations)) == (labels, annotations)
    assert listed.pod_sandbox_id == pod.id
    assert status.log_path.endswith("told/2.log")
    assert (status.started_at, status.finished_at, status.reason) == (0, 0, "")
    client.start(container_id)
    ended = client.wait_exited(container_id)
    assert before < ended.created_at <= ended.started_at <= ended.finished_at < time.time_ns()
    assert (ended.exit_code, ended.reason) == (1, "Error")
    assert client.containers()[0].state == pb.CONTAINER_EXITED


def test_the_reason_of_an_end_without_an_error_is_completed(client: Client, pod: Pod, busybox: str) -> None:
    ended = client.wait_exited(client.run(pod, busybox, ["true"]))

    assert (ended.exit_code, ended.reason) == (0, "Completed")


def test_a_program_that_is_not_there_is_named(client: Client, pod: Pod, busybox: str) -> None:
    with pytest.raises(grpc.RpcError, match="no-such-program"):
        client.run(pod, busybox, ["/no-such-program"])


def test_a_name_is_a_container_s_own_within_its_pod(client: Client, pod: Pod, busybox: str) -> None:
    client.run(pod, busybox, FOR_EVER)
    with pytest.raises(grpc.RpcError) as refused:
        client.run(pod, busybox, ["true"])
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS

    client.run(pod, busybox, ["true"], attempt=1)
    client.run(pod, busybox, ["true"], "other")

    assert len(client.containers()) == 3


# What is run


@pytest.fixture(scope="module")
def entry_image(image_registry: Registry) -> str:
    config = {
        "Entrypoint": ["echo", "entry"],
        "Cmd": ["cmd"],
        "Env": ["PATH=/bin", "FROM=image", "KEPT=image"],
        "StopSignal": "SIGUSR2",
    }
    return image_registry.push(busybox_image("entry", config), "test/entry", "1")


def test_command_and_args_stand_for_the_image_s_entrypoint_and_cmd(client: Client, pod: Pod, entry_image: str) -> None:
    def said(name: str, command: list[str], args: list[str]) -> str:
        client.wait_exited(client.run(pod, entry_image, command, name, args=args))
        return client.log(pod, name).strip()

    assert said("neither", [], []) == "entry cmd"
    assert said("args", [], ["a", "b"]) == "entry a b"
    assert said("command", ["echo", "own"], []) == "own"
    assert said("both", ["echo", "own"], ["a"]) == "own a"


def test_variables_of_the_pod_win_over_the_image_s_and_may_hold_any_bytes(
    client: Client, pod: Pod, entry_image: str
) -> None:
    envs = [
        pb.KeyValue(key="FROM", value=b"pod"),
        pb.KeyValue(key="TEXT", value="a=b \n ü".encode()),
        pb.KeyValue(key="BINARY", value=b"\xffx"),
    ]
    container_id = client.run(pod, entry_image, FOR_EVER, envs=envs)

    seen = Path(f"/proc/{running(client, container_id)}/environ").read_bytes().split(b"\0")

    assert {b"FROM=pod", b"KEPT=image", "TEXT=a=b \n ü".encode(), "BINARY=\ufffdx".encode()} <= set(seen)


def test_a_missing_working_directory_is_made(client: Client, pod: Pod, busybox: str) -> None:
    client.wait_exited(client.run(pod, busybox, ["pwd"], working_dir="/not/there/yet"))

    assert client.log(pod) == "/not/there/yet\n"


def test_a_container_has_an_input_only_where_it_is_asked_for(client: Client, pod: Pod, busybox: str) -> None:
    without = client.run(pod, busybox, ["cat"], "without")
    asked = client.run(pod, busybox, ["cat"], "with", stdin=True)

    client.wait_exited(without)
    assert client.status(asked).state == pb.CONTAINER_RUNNING


def test_a_container_has_a_terminal_where_it_is_asked_for(client: Client, pod: Pod, busybox: str) -> None:
    client.wait_exited(client.run(pod, busybox, ["tty"], "with", tty=True))
    client.wait_exited(client.run(pod, busybox, ["tty"], "without"))

    assert client.log(pod, "with").strip().startswith("/dev/")
    assert client.log(pod, "without") == "not a tty\n"


def test_the_stop_signal_is_the_container_s_else_the_image_s(client: Client, pod: Pod, entry_image: str) -> None:
    script = ["sh", "-c", "trap 'exit 11' USR1; trap 'exit 12' USR2; while :; do sleep 0.05; done"]
    own = client.run(pod, entry_image, script, "own", stop_signal=pb.SIGNAL_SIGUSR1)
    images = client.run(pod, entry_image, script, "image")
    time.sleep(0.3)

    for each in (own, images):
        client.stop(each, grace_s=10)

    assert (client.status(own).exit_code, client.status(own).stop_signal) == (11, pb.SIGNAL_SIGUSR1)
    assert (client.status(images).exit_code, client.status(images).stop_signal) == (12, pb.SIGNAL_SIGUSR2)


# Mounts


def test_mounts_are_told_and_links_of_the_node_are_followed(
    client: Client, pod: Pod, busybox: str, place: Path
) -> None:
    (place / "real").mkdir()
    (place / "real/file").write_text("text")
    (place / "link").symlink_to("real")
    mounts = [
        pb.Mount(container_path="/link", host_path=str(place / "link")),
        pb.Mount(container_path="/ro", host_path=str(place / "real"), readonly=True),
    ]
    container_id = client.run(pod, busybox, FOR_EVER, mounts=mounts)

    assert output(client, container_id, "cat /link/file /ro/file; echo more > /link/more") == "texttext"
    assert client.exec_sync(container_id, ["touch", "/ro/x"]).exit_code == 1
    assert list(client.status(container_id).mounts) == mounts


def test_a_missing_source_of_a_mount_is_an_error(client: Client, pod: Pod, busybox: str, place: Path) -> None:
    with pytest.raises(grpc.RpcError, match="nowhere"):
        client.run(pod, busybox, ["true"], mounts=[pb.Mount(container_path="/x", host_path=str(place / "nowhere"))])
    assert not (place / "nowhere").exists()


@pytest.fixture
def shared_mount(place: Path) -> Iterator[Path]:
    """A tmpfs whose mounts are shared; what is mounted below goes with it."""
    directory = place / "shared"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "rows", directory], check=True)
    subprocess.run(["mount", "--make-shared", directory], check=True)
    (directory / "below").mkdir()
    yield directory
    subprocess.run(["umount", "--recursive", directory], check=True)


def test_mounts_propagate_as_they_are_asked_to(client: Client, pod: Pod, busybox: str, shared_mount: Path) -> None:
    kinds = {
        "private": pb.PROPAGATION_PRIVATE,
        "slave": pb.PROPAGATION_HOST_TO_CONTAINER,
        "shared": pb.PROPAGATION_BIDIRECTIONAL,
    }
    ids = {}
    for name, propagation in kinds.items():
        mount = pb.Mount(container_path="/m", host_path=str(shared_mount), propagation=propagation)
        ids[name] = client.run(pod, busybox, FOR_EVER, name, mounts=[mount], linux=secure(privileged=True))
        assert client.status(ids[name]).mounts[0].propagation == propagation
    subprocess.run(["mount", "-t", "tmpfs", "rows", shared_mount / "below"], check=True)
    (shared_mount / "below/mark").touch()

    seen = {name: output(client, each, "ls /m/below") for name, each in ids.items()}
    assert seen == {"private": "", "slave": "mark", "shared": "mark"}

    for name in ("slave", "shared"):
        output(client, ids[name], f"mkdir /m/{name} && mount -t tmpfs none /m/{name} && touch /m/{name}/mark")
    assert not (shared_mount / "slave/mark").exists()
    assert (shared_mount / "shared/mark").exists()


def test_mount_options_restrict_a_mount(client: Client, pod: Pod, busybox: str, place: Path) -> None:
    features = client.runtime.Status(pb.StatusRequest(), timeout=10).features
    options = ["noexec", "nodev", "nosuid"]
    mount = pb.Mount(container_path="/m", host_path=str(place), mount_options=options)
    (place / "script").write_text("#!/bin/sh\necho ran\n")
    (place / "script").chmod(0o755)

    container_id = client.run(pod, busybox, FOR_EVER, mounts=[mount])

    assert features.mount_options
    seen = output(client, container_id, "grep ' /m ' /proc/mounts").split()[3].split(",")
    assert set(options) <= set(seen)
    assert "Permission denied" in output(client, container_id, "/m/script 2>&1 || true")
    assert list(client.status(container_id).mounts[0].mount_options) == options


def test_a_recursive_read_only_mount_covers_what_is_mounted_below(
    client: Client, busybox: str, shared_mount: Path
) -> None:
    handler = handler_with(client, "recursive_read_only_mounts")
    subprocess.run(["mount", "-t", "tmpfs", "rows", shared_mount / "below"], check=True)
    mount = pb.Mount(container_path="/m", host_path=str(shared_mount), readonly=True, recursive_read_only=True)
    pod = client.run_pod("rro", handler=handler)
    container_id = client.run(pod, busybox, FOR_EVER, mounts=[mount])

    assert "Read-only" in output(client, container_id, "touch /m/below/x 2>&1 || true")
    assert client.status(container_id).mounts[0].recursive_read_only


def test_a_recursive_read_only_mount_is_refused_where_the_runtime_lacks_it(
    client: Client, busybox: str, place: Path
) -> None:
    handlers = client.runtime.Status(pb.StatusRequest(), timeout=10).runtime_handlers
    lacking = [each.name for each in handlers if not each.features.recursive_read_only_mounts]
    if not lacking:
        pytest.skip("every OCI runtime here has recursive read-only mounts")
    pod = client.run_pod("rro", handler=lacking[0])
    mount = pb.Mount(container_path="/m", host_path=str(place), readonly=True, recursive_read_only=True)

    with pytest.raises(grpc.RpcError) as refused:
        client.run(pod, busybox, FOR_EVER, mounts=[mount])

    assert str(refused.value.details()).startswith("RROUnsupported")


def test_an_id_mapped_mount_shows_the_pod_s_ids(client: Client, busybox: str, place: Path) -> None:
    handler = handler_with(client, "user_namespaces")
    ids = [pb.IDMapping(container_id=0, host_id=HOST_IDS, length=65536)]
    options = pb.NamespaceOption(userns_options=pb.UserNamespace(mode=pb.POD, uids=ids, gids=ids))
    security = pb.LinuxSandboxSecurityContext(namespace_options=options)
    pod = client.run_pod("ids", handler=handler, linux=pb.LinuxPodSandboxConfig(security_context=security))
    mount = pb.Mount(container_path="/m", host_path=str(place), uidMappings=ids, gidMappings=ids)
    container_id = client.run(pod, busybox, FOR_EVER, mounts=[mount], linux=secure(namespace_options=options))

    output(client, container_id, "touch /m/made")

    assert ((place / "made").stat().st_uid, (place / "made").stat().st_gid) == (0, 0)
    told = client.status(container_id).mounts[0]
    assert (list(told.uidMappings), list(told.gidMappings)) == (ids, ids)


@pytest.fixture(scope="module")
def volume_image(image_registry: Registry) -> str:
    """An image that is only data."""
    blob, diff_id = layer(
        [Entry("top", b"top"), Entry("sub", mode=0o755, kind=b"5"), Entry("sub/file", b"below")],
    )
    content = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    return image_registry.push(image(content, (blob,)), "test/volume", "1")


def test_an_image_is_mounted_whole_or_in_part_and_told_by_its_digest(
    client: Client, pod: Pod, busybox: str, volume_image: str
) -> None:
    image_id = client.pull(volume_image)
    spec = pb.ImageSpec(image=volume_image)
    mounts = [
        pb.Mount(container_path="/whole", image=spec, readonly=True),
        pb.Mount(container_path="/part", image=spec, readonly=True, image_sub_path="sub"),
    ]
    container_id = client.run(pod, busybox, FOR_EVER, mounts=mounts)

    assert output(client, container_id, "cat /whole/top /whole/sub/file /part/file") == "topbelowbelow"
    assert "Read-only" in output(client, container_id, "touch /whole/x 2>&1 || true")
    whole, part = client.status(container_id).mounts
    assert (whole.image.image, whole.image.image_ref) == (volume_image, image_id)
    assert part.image_sub_path == "sub"


def test_a_sub_path_that_an_image_lacks_is_an_error(client: Client, pod: Pod, busybox: str, volume_image: str) -> None:
    mount = pb.Mount(
        container_path="/v", image=pb.ImageSpec(image=volume_image), readonly=True, image_sub_path="nowhere"
    )

    with pytest.raises(grpc.RpcError) as refused:
        client.run(pod, busybox, ["true"], mounts=[mount])

    assert str(refused.value.details()).startswith("ImageVolumeMountFailed")


# Devices


def test_devices_are_there_with_their_permissions_a_directory_with_all_of_its_own(
    client: Client, pod: Pod, busybox: str, place: Path
) -> None:
    (place / "dir").mkdir()
    for name, minor in (("zero", 5), ("full", 7)):
        os.mknod(place / "dir" / name, stat.S_IFCHR | 0o666, os.makedev(1, minor))
    os.mknod(place / "kmsg", stat.S_IFCHR | 0o666, os.makedev(1, 11))
    devices = [
        pb.Device(host_path=str(place / "dir"), container_path="/dev/given", permissions="rw"),
        pb.Device(host_path=str(place / "kmsg"), container_path="/dev/read-only", permissions="r"),
    ]
    container_id = client.run(pod, busybox, FOR_EVER, devices=devices)

    assert output(client, container_id, "ls /dev/given").split() == ["full", "zero"]
    assert output(client, container_id, "head -c 3 /dev/given/zero | od -An -tx1").split() == ["00"] * 3
    assert "not permitted" in output(client, container_id, "(echo x > /dev/read-only) 2>&1 || true")


# Resources


def test_limits_are_those_of_the_cgroup_are_told_and_can_be_changed(client: Client, pod: Pod, busybox: str) -> None:
    memory = 64 << 20
    linux = limited(
        cpu_period=50_000,
        cpu_quota=20_000,
        cpu_shares=512,
        memory_limit_in_bytes=memory,
        memory_swap_limit_in_bytes=2 * memory,
        oom_score_adj=500,
        cpuset_cpus="0",
        cpuset_mems="0",
    )
    container_id = client.run(pod, busybox, FOR_EVER, linux=linux)
    pid = running(client, container_id)

    def seen() -> dict[str, str]:
        found = {
            "quota": limit(pid, "cpu.cfs_quota_us", "cpu.max"),
            "period": limit(pid, "cpu.cfs_period_us", "cpu.max"),
            "shares": limit(pid, "cpu.shares", "cpu.weight"),
            "memory": limit(pid, "memory.limit_in_bytes", "memory.max"),
            "swap": limit(pid, "memory.memsw.limit_in_bytes", "memory.swap.max"),
            "cpus": limit(pid, "cpuset.cpus", "cpuset.cpus"),
            "mems": limit(pid, "cpuset.mems", "cpuset.mems"),
        }
        if " " in found["quota"]:
            found["quota"], found["period"] = found["quota"].split()
            found["swap"] = str(int(found["swap"]) + int(found["memory"]))
        return found

    shares = seen()["shares"]
    assert shares == "512" or int(shares) < 100
    assert seen() == {
        **{"quota": "20000", "period": "50000", "shares": shares, "memory": str(memory), "swap": str(2 * memory)},
        **{"cpus": "0", "mems": "0"},
    }
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "500\n"
    assert client.status(container_id).resources.linux == linux.resources

    wanted = pb.LinuxContainerResources(
        cpu_period=60_000,
        cpu_quota=30_000,
        cpu_shares=2048,
        memory_limit_in_bytes=2 * memory,
        memory_swap_limit_in_bytes=3 * memory,
        oom_score_adj=600,
        cpuset_cpus="0-1" if (os.cpu_count() or 1) > 1 else "0",
        cpuset_mems="0",
    )
    request = pb.UpdateContainerResourcesRequest(container_id=container_id, linux=wanted)
    client.runtime.UpdateContainerResources(request, timeout=30)

    after = seen()
    assert after["shares"] == "2048" or int(shares) < int(after["shares"]) < 1000
    assert after == {
        **{"quota": "30000", "period": "60000", "shares": after["shares"], "memory": str(2 * memory)},
        **{"swap": str(3 * memory), "cpus": wanted.cpuset_cpus, "mems": "0"},
    }
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "600\n"
    assert client.status(container_id).resources.linux == wanted

    # As the kubelet's CPU manager does it: a score of 0 is one that is not given.
    cpus = pb.LinuxContainerResources(cpuset_cpus="0")
    request = pb.UpdateContainerResourcesRequest(container_id=container_id, linux=cpus)
    client.runtime.UpdateContainerResources(request, timeout=30)
    assert seen()["cpus"] == "0"
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "600\n"
    assert client.status(container_id).resources.linux.oom_score_adj == 600


def test_huge_pages_are_limited(client: Client, pod: Pod, busybox: str) -> None:
    if not Path("/sys/kernel/mm/hugepages/hugepages-2048kB").is_dir():
        pytest.skip("this kernel has no huge pages of 2 MiB")
    limits = [pb.HugepageLimit(page_size="2MB", limit=4 << 20)]
    container_id = client.run(pod, busybox, FOR_EVER, linux=limited(hugepage_limits=limits))
    pid = pid_of(client, container_id)

    assert limit(pid, "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max") == str(4 << 20)
    assert list(client.status(container_id).resources.linux.hugepage_limits) == limits


def test_unified_keys_are_written_on_cgroup_v2_and_refused_on_v1(client: Client, pod: Pod, busybox: str) -> None:
    linux = limited(unified={"memory.high": str(50 << 20)})
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        container_id = client.run(pod, busybox, FOR_EVER, linux=linux)
        assert limit(pid_of(client, container_id), "memory.none", "memory.high") == str(50 << 20)
        assert dict(client.status(container_id).resources.linux.unified) == {"memory.high": str(50 << 20)}
        return

    with pytest.raises(grpc.RpcError, match=r"memory\.high") as refused:
        client.run(pod, busybox, FOR_EVER, linux=linux)

    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


# Security


def test_capabilities_are_added_dropped_and_ambient(client: Client, pod: Pod, busybox: str) -> None:
    def run(name: str, user: int = 0, **fields: Any) -> str:
        linux = secure(capabilities=pb.Capability(**fields), run_as_user=number(user))
        return client.run(pod, busybox, FOR_EVER, name, linux=linux)

    added = run("added", add_capabilities=["CAP_SYS_TIME"], drop_capabilities=["CHOWN"])
    none = run("none", drop_capabilities=["ALL"])
    one = run("one", drop_capabilities=["ALL"], add_capabilities=["net_admin"])
    ambient = run("ambient", user=1000, add_ambient_capabilities=["NET_BIND_SERVICE"])

    assert "SYS_TIME" in capabilities(client, added, "CapEff")
    assert "CHOWN" not in capabilities(client, added, "CapBnd")
    assert "KILL" in capabilities(client, added, "CapEff")
    assert capabilities(client, none, "CapBnd") == set()
    assert capabilities(client, one, "CapEff") == {"NET_ADMIN"}
    assert capabilities(client, ambient, "CapEff") == capabilities(client, ambient, "CapAmb") == {"NET_BIND_SERVICE"}


def test_a_privileged_container_is_held_back_by_nothing(client: Client, busybox: str) -> None:
    privileged = pb.LinuxSandboxSecurityContext(privileged=True)
    pod = client.run_pod("privileged", linux=pb.LinuxPodSandboxConfig(security_context=privileged))
    runtime_default = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
    linux = secure(privileged=True, seccomp=runtime_default, masked_paths=["/proc/version"])
    container_id = client.run(pod, busybox, FOR_EVER, linux=linux)

    assert capabilities(client, container_id, "CapBnd") == caps.own()
    assert process_status(client, container_id, "Seccomp") == "0"
    assert output(client, container_id, "cat /proc/version") == Path("/proc/version").read_text().strip()
    assert output(client, container_id, "ls /dev/kmsg; mount -t tmpfs none /tmp") == "/dev/kmsg"
    assert "rw" in output(client, container_id, "grep ' /sys ' /proc/mounts").split()[3].split(",")


def test_user_and_groups_are_as_asked_and_told(client: Client, pod: Pod, busybox: str) -> None:
    features = client.runtime.Status(pb.StatusRequest(), timeout=10).features

    def ids(name: str, **fields: Any) -> tuple[int, int, list[int]]:
        container_id = client.run(pod, busybox, FOR_EVER, name, linux=secure(**fields))
        told = client.status(container_id).user.linux
        uid, gid = (int(process_status(client, container_id, each).split()[0]) for each in ("Uid", "Gid"))
        groups = sorted({gid, *map(int, process_status(client, container_id, "Groups").split())})
        assert (told.uid, told.gid, list(told.supplemental_groups)) == (uid, gid, groups)
        return uid, gid, groups

    assert features.supplemental_groups_policy
    assert ids("name", run_as_username="web") == (1000, 1000, [1000, 2000])
    assert ids("number", run_as_user=number(1000)) == (1000, 1000, [1000, 2000])
    assert ids("group", run_as_user=number(5), run_as_group=number(6)) == (5, 6, [6])
    merged = {"run_as_user": number(1000), "run_as_group": number(1000), "supplemental_groups": [7]}
    assert ids("merge", **merged) == (1000, 1000, [7, 1000, 2000])
    assert ids("strict", **merged, supplemental_groups_policy=pb.Strict) == (1000, 1000, [7, 1000])
    with pytest.raises(grpc.RpcError, match="nobody-knows"):
        client.run(pod, busybox, ["true"], "unknown", linux=secure(run_as_username="nobody-knows"))


def test_the_root_is_read_only_and_privileges_are_not_gained_where_asked_for(
    client: Client, pod: Pod, busybox: str
) -> None:
    plain = client.run(pod, busybox, FOR_EVER, "plain")
    held = client.run(pod, busybox, FOR_EVER, "held", linux=secure(readonly_rootfs=True, no_new_privs=True))

    assert process_status(client, plain, "NoNewPrivs") == "0"
    assert process_status(client, held, "NoNewPrivs") == "1"
    assert client.exec_sync(plain, ["touch", "/x"]).exit_code == 0
    assert client.exec_sync(held, ["touch", "/x"]).exit_code == 1


def test_paths_are_masked_and_read_only_where_asked_for(client: Client, pod: Pod, busybox: str) -> None:
    linux = secure(masked_paths=["/etc/passwd"], readonly_paths=["/home"])
    container_id = client.run(pod, busybox, FOR_EVER, linux=linux)

    assert output(client, container_id, "cat /etc/passwd") == ""
    assert client.exec_sync(container_id, ["touch", "/home/x"]).exit_code == 1
    assert client.exec_sync(container_id, ["touch", "/root/x"]).exit_code == 0


def test_seccomp_is_none_the_runtime_s_or_a_file_s(client: Client, pod: Pod, busybox: str, place: Path) -> None:
    (place / "deny.json").write_text(json.dumps(DENY_MKDIR))
    kinds = pb.SecurityProfile

    def run(name: str, **fields: Any) -> str:
        return client.run(pod, busybox, FOR_EVER, name, linux=secure(**fields))

    none = run("none")
    default = run("default", seccomp=kinds(profile_type=kinds.RuntimeDefault))
    unconfined = run("unconfined", seccomp=kinds(profile_type=kinds.Unconfined))
    local = run("local", seccomp=kinds(profile_type=kinds.Localhost, localhost_ref=f"localhost/{place}/deny.json"))
    deprecated = run("deprecated", seccomp_profile_path=f"localhost/{place}/deny.json")

    modes = [process_status(client, each, "Seccomp") for each in (none, default, unconfined, local, deprecated)]
    assert modes == ["0", "2", "0", "2", "2"]
    made = [client.exec_sync(each, ["mkdir", "/made"]).exit_code for each in (none, default, local, deprecated)]
    assert made == [0, 0, 1, 1]


@pytest.mark.parametrize("field", ["apparmor", "apparmor_profile"])
def test_an_apparmor_profile_is_used_or_refused_where_there_is_no_apparmor(
    client: Client, pod: Pod, busybox: str, field: str
) -> None:
    localhost = pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref="no-such-profile")
    value = localhost if field == "apparmor" else "localhost/no-such-profile"

    with pytest.raises(grpc.RpcError, match="no-such-profile"):
        client.run(pod, busybox, FOR_EVER, linux=secure(**{field: value}))


# Logs


def test_a_rotated_log_goes_on_in_a_new_file(client: Client, pod: Pod, busybox: str) -> None:
    container_id = client.run(pod, busybox, ["sh", "-c", "while :; do echo line; sleep 0.05; done"])
    log = Path(client.status(container_id).log_path)
    while not log.stat().st_size:
        time.sleep(0.02)
    log.rename(log.with_suffix(".old"))

    client.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=container_id), timeout=10)

    deadline = time.monotonic() + 10
    while not log.exists() or not log.stat().st_size:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert log.read_text().endswith("stdout F line\n")
