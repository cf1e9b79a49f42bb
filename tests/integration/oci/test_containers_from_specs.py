"""What a container sees of its runtime-spec, from inside."""

import asyncio
import json
import os
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from oci import spec, stats
from oci.container_spec import (
    Capabilities,
    Device,
    IdMapping,
    Mount,
    NamespaceMode,
    Profile,
    ProfileKind,
    Propagation,
    Resources,
    SecurityContext,
    UserNamespace,
)
from oci.errors import FailedPrecondition, InvalidArgument, NotFound
from oci.host import HostObjects
from oci.image import ImageConfig
from oci.linux import caps, cgroup, mount, proc
from oci.linux.passwd import User
from oci.rootfs import Shift
from oci.runtime import error_text

from .conftest import Host, pod_environment, secure, shell

DEFAULT_MASKED = ("/proc/kcore", "/proc/keys")


def status_of(text: str, field: str) -> str:
    return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(f"{field}:"))


def test_a_process_runs_as_root_with_the_default_capabilities_and_no_filter(machine: Host) -> None:
    status = machine.run(shell("cat /proc/self/status"))

    assert status_of(status, "Uid").split() == ["0"] * 4
    for field in ("CapBnd", "CapEff", "CapPrm"):
        assert caps.from_mask(int(status_of(status, field), 16)) == set(caps.DEFAULT)
    for field in ("CapInh", "CapAmb"):
        assert int(status_of(status, field), 16) == 0
    assert status_of(status, "Seccomp") == "0"
    assert status_of(status, "NoNewPrivs") == "0"


def test_a_user_by_name_gets_the_groups_of_the_image(machine: Host) -> None:
    wanted = secure("id; pwd; echo $HOME", run_as_username="web", supplemental_groups=(7000,))

    ids, directory, home = machine.run(replace(wanted, working_dir="/made/for it")).splitlines()

    assert ids == "uid=1000(web) gid=1001(web) groups=1001(web),5000(shared),7000"
    assert directory == "/made/for it"
    assert home == "/home/web"


def test_strict_groups_leave_out_those_of_the_image(machine: Host) -> None:
    wanted = secure(
        "id -G", run_as_user=1000, run_as_group=3, supplemental_groups=(7000,), strict_supplemental_groups=True
    )

    assert machine.run(wanted) == "3 7000"


def test_capabilities_are_added_and_dropped(machine: Host) -> None:
    wanted = Capabilities(add=("NET_ADMIN",), drop=("ALL",), add_ambient=("NET_BIND_SERVICE",))

    status = machine.run(secure("cat /proc/self/status", run_as_user=1000, capabilities=wanted))

    assert caps.from_mask(int(status_of(status, "CapBnd"), 16)) == {"NET_ADMIN", "NET_BIND_SERVICE"}
    assert caps.from_mask(int(status_of(status, "CapEff"), 16)) == {"NET_BIND_SERVICE"}
    assert caps.from_mask(int(status_of(status, "CapAmb"), 16)) == {"NET_BIND_SERVICE"}


def test_the_default_seccomp_profile_filters(machine: Host) -> None:
    default = Profile(ProfileKind.RUNTIME_DEFAULT)

    output = machine.run(secure("grep Seccomp: /proc/self/status; unshare -U true; swapoff /x; true", seccomp=default))
    refused = machine.attempt(secure("unshare -U true", seccomp=default))

    assert status_of(output, "Seccomp") == "2"
    assert refused.returncode != 0
    assert "Operation not permitted" in refused.stderr


def test_a_localhost_seccomp_profile_is_read_from_its_file(machine: Host) -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 17, "includes": {}, "args": None}
        ],
    }
    path = machine.directory / "profile.json"
    path.write_text(json.dumps(profile))

    done = machine.attempt(secure("mkdir /new", seccomp=Profile(ProfileKind.LOCALHOST, str(path))))

    assert "File exists" in done.stderr


def test_no_new_privileges_is_set(machine: Host) -> None:
    status = machine.run(secure("cat /proc/self/status", no_new_privs=True))

    assert status_of(status, "NoNewPrivs") == "1"


def test_a_read_only_root_keeps_its_files(machine: Host) -> None:
    script = "touch /x 2>&1; touch /dev/shm/y && echo shm; echo a >/etc/hosts || true"
    done = machine.attempt(secure(script, readonly_rootfs=True))

    assert "touch: /x: Read-only file system" in done.stdout
    assert "shm" in done.stdout
    assert "/etc/hosts: Read-only file system" in done.stderr


def test_the_pods_files_hostname_and_namespaces_are_there(machine: Host) -> None:
    output = machine.run(
        shell(
            "hostname; echo $HOSTNAME; cat /etc/resolv.conf /etc/hostname /etc/hosts; "
            "readlink /proc/self/ns/net; readlink /proc/self/ns/ipc; readlink /proc/self/ns/uts; echo $$; "
            "ls /sys/class/net; grep ' /dev/shm ' /proc/mounts"
        )
    ).splitlines()

    assert output[:5] == ["podhost", "podhost", "resolv.conf of the pod", "hostname of the pod", "hosts of the pod"]
    pinned = [machine.pod.net_ns, machine.pod.ipc_ns, machine.pod.uts_ns]
    assert [int(re.sub(r"\D", "", line)) for line in output[5:8]] == [Path(path).stat().st_ino for path in pinned]
    assert output[8] == "1"
    assert "lo" in output[9:-1]
    assert not {"eth0", "docker0"} & set(output[9:-1])
    assert "size=1024k" in output[-1]


def test_what_the_kubelet_masks_is_masked_and_read_only(machine: Host) -> None:
    wanted = secure(
        "cat /proc/kcore | wc -c; echo 1 >/proc/sys/kernel/x",
        masked_paths=DEFAULT_MASKED,
        readonly_paths=("/proc/sys",),
    )

    done = machine.attempt(wanted)

    assert done.stdout == "0\n"
    assert "Read-only file system" in done.stderr or "nonexistent directory" in done.stderr


def test_a_privileged_container_sees_devices_and_writable_kernel_files(machine: Host) -> None:
    script = (
        "ls /dev/vda /dev/null; grep -c ' ro,' /proc/mounts; grep Cap /proc/self/status; grep Seccomp: /proc/1/status"
    )
    wanted = secure(script, privileged=True, seccomp=Profile(ProfileKind.RUNTIME_DEFAULT), masked_paths=DEFAULT_MASKED)

    output = machine.attempt(wanted).stdout

    assert "/dev/null" in output
    if Path("/dev/vda").exists():
        assert "/dev/vda" in output
    assert caps.from_mask(int(status_of(output, "CapEff"), 16)) == caps.own()
    assert status_of(output, "Seccomp") == "0"


def test_limits_are_in_the_cgroup_and_can_be_changed(machine: Host) -> None:
    node = machine.node
    wanted = shell("sleep 60", resources=Resources(memory_limit_bytes=64 << 20, cpu_shares=512, cpu_quota=50000))
    id = machine.start(wanted)
    path = machine.cgroup(id)

    before = stats.read(node.cgroups, path)
    update = spec.update_resources(Resources(memory_limit_bytes=128 << 20, cpu_shares=256), node)
    asyncio.run(machine.runtime.update(id, update))
    after = stats.read(node.cgroups, path)

    assert before.memory is not None
    assert before.memory.available_bytes == (64 << 20) - before.memory.working_set_bytes
    assert after.memory is not None
    assert after.memory.available_bytes == (128 << 20) - after.memory.working_set_bytes
    assert after.cpu is not None
    assert after.cpu.usage_core_ns > 0
    assert after.processes == 1
    assert after.swap is None or after.swap.available_bytes == 0
    if node.cgroups.version is not cgroup.Version.V2:
        cpu = node.cgroups.directory("cpu", path)
        assert cpu is not None
        assert (cpu / "cpu.shares").read_text() == "256\n"
        assert (cpu / "cpu.cfs_quota_us").read_text() == "50000\n"


def test_the_file_limit_is_the_default_and_the_oom_score_is_the_pods(machine: Host) -> None:
    output = machine.run(
        shell("ulimit -Sn; ulimit -Hn; cat /proc/self/oom_score_adj", resources=Resources(oom_score_adj=987))
    )

    assert output.split() == [str(machine.defaults.rlimits[0].soft), str(machine.defaults.rlimits[0].hard), "987"]


def test_an_oom_score_below_what_is_permitted_is_clamped(machine: Host) -> None:
    wanted = shell("cat /proc/self/oom_score_adj", resources=Resources(oom_score_adj=-998))

    assert int(machine.run(wanted)) == max(-998, machine.node.lowest_oom_score_adj)


def test_devices_can_be_used_only_when_they_are_asked_for(machine: Host) -> None:
    wanted = shell("head -c 4 /dev/wanted | wc -c", devices=(Device("/dev/wanted", "/dev/zero", "r"),))

    assert machine.run(wanted) == "4"
    number = Path("/dev/kmsg").stat().st_rdev
    refused = machine.attempt(
        shell(
            f"mknod /tmp/kmsg c {os.major(number)} {os.minor(number)} && head -c 1 /tmp/kmsg",
            security=SecurityContext(capabilities=Capabilities(add=("MKNOD",))),
        )
    )
    assert refused.returncode != 0
    assert "Operation not permitted" in refused.stderr


def test_mounts_are_nested_read_only_and_take_options(machine: Host) -> None:
    outer, inner = machine.directory / "outer", machine.directory / "inner"
    outer.mkdir()
    inner.mkdir()
    (outer / "o").write_text("outer")
    (inner / "i").write_text("inner")
    (machine.directory / "link").symlink_to(inner)
    mounts = (
        Mount("/mnt/a/b", str(machine.directory / "link"), readonly=True, options=("noexec",)),
        Mount("/mnt/a", str(outer)),
        Mount("/etc/hosts", str(outer / "o")),
    )

    output = machine.run(
        shell(
            "cat /mnt/a/o /mnt/a/b/i /etc/hosts; touch /mnt/a/b/x; grep ' /mnt/a/b ' /proc/mounts; true", mounts=mounts
        )
    )

    assert output.startswith("outerinnerouter")
    options = output.splitlines()[-1].split()[3].split(",")
    assert {"ro", "noexec"} <= set(options)
    assert (outer / "b").is_dir()


def test_propagation_reaches_the_container_and_the_host(machine: Host) -> None:
    volume = machine.directory / "volume"
    (volume / "from-host").mkdir(parents=True)
    (volume / "from-container").mkdir()
    mount.bind(volume, volume)
    mount.make_shared(volume)
    admin = SecurityContext(privileged=True)
    wanted = shell(
        "mount -t tmpfs none /v/from-container && sleep 60",
        mounts=(Mount("/v", str(volume), propagation=Propagation.BIDIRECTIONAL),),
        security=admin,
    )
    id = machine.start(wanted)

    for _ in range(100):
        if mount.is_mountpoint(volume / "from-container"):
            break
        asyncio.run(asyncio.sleep(0.02))
    mount.tmpfs(volume / "from-host")
    config = machine.bundles.read(id)
    seen = machine.exec(id, spec.exec_process(config, ["grep", "-c", " /v/from-", "/proc/mounts"]))

    assert mount.is_mountpoint(volume / "from-container")
    assert seen == "2"


def test_propagation_of_a_private_mount_is_refused(machine: Host) -> None:
    volume = machine.directory / "volume"
    volume.mkdir()
    mount.bind(volume, volume)
    wanted = shell("true", mounts=(Mount("/v", str(volume), propagation=Propagation.BIDIRECTIONAL),))

    with pytest.raises(FailedPrecondition, match="is not shared"):
        machine.prepare(wanted)


def test_a_missing_host_path_is_an_error_that_names_it(machine: Host) -> None:
    with pytest.raises(InvalidArgument, match=r"mount of '/no/such' at '/v': host_path: No such file"):
        machine.prepare(shell("true", mounts=(Mount("/v", "/no/such"),)))


def test_a_recursive_read_only_mount_covers_what_is_below_or_is_refused(machine: Host) -> None:
    volume = machine.directory / "volume"
    (volume / "below").mkdir(parents=True)
    mount.tmpfs(volume / "below")
    wanted = shell("touch /v/below/x", mounts=(Mount("/v", str(volume), readonly=True, recursive_read_only=True),))

    if machine.features.recursive_read_only:
        assert "Read-only file system" in machine.attempt(wanted).stderr
    else:
        with pytest.raises(FailedPrecondition, match=r"^RROUnsupported"):
            machine.prepare(wanted)


def test_image_volumes_hold_what_the_image_has_there(machine: Host) -> None:
    image = ImageConfig(volumes=("/data", "/new/volume"))

    output = machine.run(
        shell("cat /data/inner/link; stat -c %u:%g /data/file; ls /new/volume | wc -l; rm /data/file"), image
    )

    assert output.splitlines() == ["from the image1000:1001", "0"]
    assert (machine.layers[0] / "data/file").exists()


def test_an_image_without_anything_from_the_pod_runs_its_entrypoint(machine: Host) -> None:
    image = ImageConfig(entrypoint=("/bin/echo",), cmd=("from", "the image"), env=("A=1", "PATH=/bin"), user="web")

    assert machine.run(replace(shell(""), command=()), image) == "from the image"
    assert machine.run(replace(shell(""), command=(), args=("args",)), image) == "args"
    assert machine.run(shell("echo $A $B $PATH", envs=(("B", "two"), ("A", "3"))), image) == "3 two /bin"


def test_exec_runs_with_what_the_first_process_has(machine: Host) -> None:
    id = machine.start(secure("sleep 60", run_as_user=1000, capabilities=Capabilities(drop=("ALL",))))
    config = machine.bundles.read(id)

    output = machine.exec(
        id, spec.exec_process(config, ["sh", "-c", "id -u; grep CapBnd /proc/self/status; echo $X"], env=[("X", "y")])
    )

    assert output.split() == ["1000", "CapBnd:", "0000000000000000", "y"]


def test_the_pid_namespace_is_the_nodes_or_a_targets_when_asked_for(machine: Host) -> None:
    on_node = machine.run(secure("cat /proc/1/comm", pid=NamespaceMode.NODE))

    assert on_node == Path("/proc/1/comm").read_text().strip()
    id = machine.start(shell("sleep 61"))
    pid = asyncio.run(machine.runtime.state(id)).pid
    machine.pod = replace(machine.pod, pid_ns=f"/proc/{pid}/ns/pid")
    assert machine.run(shell("cat /proc/1/cmdline")).split("\0")[-3:] == ["sleep", "61", ""]


def test_a_user_namespace_shifts_the_image_and_the_writable_layer(machine: Host) -> None:
    mapping = (IdMapping(0, 200_000, 65536),)
    mappings = UserNamespace(mapping, mapping)
    (machine.directory / "shifted").mkdir()
    machine.pod = pod_environment(machine.directory / "shifted", mappings)
    shift = Shift(mappings, machine.pod.user_ns)

    output = machine.run(
        shell(
            "id -u; stat -c %u:%g / /bin/busybox /data/file; cat /proc/self/uid_map; touch /made; chown 5 /data/file"
        ),
        shift=shift,
    )

    lines = output.splitlines()
    assert lines[:4] == ["0", "0:0", "0:0", "1000:1001"]
    assert lines[4].split() == ["0", "200000", "65536"]
    upper = machine.rootfs.writable_layer(machine.ids[-1])
    assert (upper / "made").stat().st_uid == 200_000
    assert (upper / "data/file").stat().st_uid == 200_005
    assert (machine.layers[0] / "data/file").stat().st_uid == 1000


def test_apparmor_confines_where_it_is_there(machine: Host) -> None:
    if not machine.node.has_apparmor:
        pytest.skip("this host has no AppArmor")
    read = "cat /proc/self/attr/current"

    assert machine.run(shell(read)) == f"{machine.node.apparmor_default} (enforce)"
    assert machine.run(secure(read, apparmor=Profile(ProfileKind.UNCONFINED))) == "unconfined"
    assert machine.run(secure(read, privileged=True)) == "unconfined"
    refused = machine.attempt(secure("mount -t tmpfs none /tmp", capabilities=Capabilities(add=("SYS_ADMIN",))))
    assert refused.returncode != 0
    assert "denied" in refused.stderr


def test_the_runtime_tells_the_state_and_kills(machine: Host) -> None:
    id = machine.start(shell("sleep 60"))

    state = asyncio.run(machine.runtime.state(id))
    started = proc.start_time(state.pid)
    assert started is not None
    pids = asyncio.run(machine.runtime.processes(id))
    asyncio.run(machine.runtime.kill(id, 9))
    for _ in range(200):
        if not proc.is_alive(state.pid, started):
            break
        asyncio.run(asyncio.sleep(0.01))

    assert state.status == "running"
    assert state.bundle == str(machine.bundles.path(id))
    assert state.pid in pids
    assert not proc.is_alive(state.pid, started)
    asyncio.run(machine.runtime.delete(id))
    with pytest.raises(NotFound):
        asyncio.run(machine.runtime.state(id))
    with pytest.raises(NotFound):
        asyncio.run(machine.runtime.kill(id, 9))


def test_a_runtimes_error_says_what_it_saw(machine: Host) -> None:
    done = machine.attempt(replace(shell(""), command=("/no/such/program",)))

    assert done.returncode != 0
    assert "no/such/program" in error_text(done.stderr.encode())


def test_a_mount_over_dev_hides_the_default_ones_below_it(machine: Host) -> None:
    volume = machine.directory / "dev"
    volume.mkdir()
    _, config = machine.prepare(shell("true", mounts=(Mount("/dev/", str(volume)),)))

    destinations = [each["destination"] for each in config["mounts"]]

    assert destinations.count("/dev") == 1
    assert not [path for path in destinations if path.startswith("/dev/")]


def test_a_hundred_and_more_layers_make_one_root(machine: Host) -> None:
    for number in range(130):
        layer = machine.directory / "layers" / f"{number:064d}"
        (layer / "n").mkdir(parents=True)
        (layer / "n" / str(number)).touch()
        (layer / "top").write_text(str(number))
        machine.layers.append(layer)

    assert machine.run(shell("ls /n | wc -l; cat /top")) == "130\n129"


def test_memory_beyond_the_limit_is_refused_by_the_kernel(machine: Host) -> None:
    wanted = shell("dd if=/dev/zero of=/dev/null bs=200M count=1", resources=Resources(memory_limit_bytes=32 << 20))

    assert machine.attempt(wanted).returncode != 0


def test_shm_belongs_to_the_pod(machine: Host) -> None:
    machine.run(shell("echo kept >/dev/shm/file"))

    assert machine.run(shell("cat /dev/shm/file")) == "kept"
    assert stat.S_IMODE(Path(machine.pod.shm_path).stat().st_mode) == 0o1777


def test_a_container_on_the_nodes_network_and_ipc_has_them(machine: Host) -> None:
    machine.pod = replace(machine.pod, net_ns="", ipc_ns="", uts_ns="")

    output = machine.run(shell("readlink /proc/self/ns/net; readlink /proc/self/ns/ipc; ls -d /dev/mqueue"))

    own = [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("net", "ipc")]
    assert output.split() == [*own, "/dev/mqueue"]


def test_image_mounts_are_read_only(machine: Host) -> None:
    volume = machine.directory / "image"
    volume.mkdir()
    id, _ = machine.prepare(shell("true"))
    wanted = shell("touch /v/x", mounts=(Mount("/v", image="image"),))

    config = spec.build(
        wanted,
        ImageConfig(),
        machine.pod,
        machine.node,
        placement=spec.Placement(
            id,
            machine.rootfs.path(id),
            User(0, 0, (0,)),
            cgroup.runtime_path(machine.runtime.driver, machine.parent, id),
            image_mounts={"/v": volume},
        ),
        host=HostObjects(),
        features=machine.features,
        defaults=machine.defaults,
    )
    machine.bundles.write(id, config)

    assert "Read-only file system" in machine.command("run", "--bundle", str(machine.bundles.path(id)), id).stderr
