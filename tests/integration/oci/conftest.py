"""Real containers from real specs: crun and runc, an overlay of a busybox layer, pinned namespaces; nothing stays."""

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from oci import host, runtime, spec
from oci.bundle import Bundles
from oci.container_spec import (
    ContainerId,
    ContainerSpec,
    PodEnvironment,
    SandboxId,
    SecurityContext,
    UserNamespace,
)
from oci.image import ImageConfig
from oci.linux import cgroup, lsm, mount, passwd
from oci.linux import node as nodes
from oci.linux.systemd import Systemd
from oci.rootfs import Rootfs, Shift

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
web:x:1000:1001:Web:/home/web:/bin/sh
"""
GROUP = """\
root:x:0:
web:x:1001:
shared:x:5000:web,other
other:x:5001:other
"""


PERMITTED = tuple(nodes.permitted(limit) for limit in nodes.DEFAULT_RLIMITS)


@dataclass
class Host:
    """A private place on this machine where one test runs containers with one OCI runtime."""

    directory: Path
    runtime: runtime.Runtime
    parent: str
    layers: list[Path]
    rootfs: Rootfs
    bundles: Bundles
    node: nodes.Node
    features: spec.RuntimeFeatures
    pod: PodEnvironment
    defaults: spec.Defaults = field(default_factory=lambda: spec.Defaults(rlimits=PERMITTED))
    ids: list[ContainerId] = field(default_factory=list)

    def prepare(
        self,
        wanted: ContainerSpec,
        image: ImageConfig | None = None,
        *,
        shift: Shift | None = None,
        annotations: Mapping[str, str] | None = None,
    ) -> tuple[ContainerId, dict[str, Any]]:
        """What CreateContainer does up to the bundle: the id and the runtime-spec."""
        image = image or ImageConfig()
        id = ContainerId(f"{self.runtime.name}-{os.getpid()}-{len(self.ids)}")
        self.ids.append(id)
        root = self.rootfs.mount(id, self.layers, shift=shift)
        user = passwd.resolve(root, image.user, wanted.security)
        self.rootfs.make_working_directory(id, spec.working_directory(wanted, image), shift=shift)
        mounted = [each.container_path for each in wanted.mounts]
        config = spec.build(
            wanted,
            image,
            self.pod,
            self.node,
            placement=spec.Placement(
                container_id=id,
                rootfs=root,
                user=user,
                cgroups_path=cgroup.runtime_path(self.runtime.driver, self.parent, id),
                volumes=self.rootfs.make_volumes(id, image.volumes, mounted, shift=shift),
                annotations=annotations or {},
            ),
            host=asyncio.run(host.look_up(wanted)),
            features=self.features,
            defaults=self.defaults,
        )
        self.bundles.write(id, config)
        return id, config

    def run(self, wanted: ContainerSpec, image: ImageConfig | None = None, *, shift: Shift | None = None) -> str:
        """The output of a container that has to succeed."""
        done = self.attempt(wanted, image, shift=shift)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout.rstrip("\n")

    def attempt(
        self, wanted: ContainerSpec, image: ImageConfig | None = None, *, shift: Shift | None = None
    ) -> subprocess.CompletedProcess[str]:
        id, _ = self.prepare(wanted, image, shift=shift)
        return self.command("run", "--bundle", str(self.bundles.path(id)), id)

    def start(self, wanted: ContainerSpec) -> ContainerId:
        """A container that goes on in the background."""
        id, _ = self.prepare(wanted)
        with (self.directory / "output").open("w") as output:
            argv = [*self.runtime.argv, "run", "--detach", "--bundle", str(self.bundles.path(id)), id]
            done = subprocess.run(argv, input=b"", stdout=output, stderr=output, timeout=30, check=False)
        assert done.returncode == 0, (self.directory / "output").read_text()
        return id

    def exec(self, id: ContainerId, process: Mapping[str, Any]) -> str:
        (self.directory / "process.json").write_text(json.dumps(process))
        done = self.command("exec", "--process", str(self.directory / "process.json"), id)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout.rstrip("\n")

    def cgroup(self, id: ContainerId) -> str:
        """Where the container's cgroup lies."""
        return cgroup.child_path(self.runtime.driver, self.parent, id)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.runtime.argv, *arguments],
            input="",  # a pipe: crun would give the host's null device to the container's user
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=30,
            check=False,
        )

    def close(self) -> None:
        """Everything that the test has made is taken back, and nothing may be left."""
        for id in self.ids:
            asyncio.run(self.runtime.delete(id))
            self.rootfs.remove(id)
            self.bundles.remove(id)
        self.rootfs.release()
        if self.node.has_apparmor:
            Path("/sys/kernel/security/apparmor/.remove").write_text(self.node.apparmor_default)
            assert self.node.apparmor_default not in lsm.apparmor_profiles()
        cgroups, parent = cgroup.detect(), cgroup.parent_path(self.runtime.driver, self.parent)
        if self.runtime.driver is cgroup.Driver.SYSTEMD:
            asyncio.run(Systemd().stop_unit("critotest.slice"))
        else:
            cgroups.remove(parent)
        mount.unmount_below(self.directory)
        assert mount.mounts_below(self.directory) == []
        assert not cgroups.exists(parent)
        assert self.bundles.ids() == []
        assert asyncio.run(self.runtime.ids()) == []


def shell(script: str, **fields: Any) -> ContainerSpec:
    return replace(ContainerSpec("test", image="busybox", command=("/bin/sh", "-c", script)), **fields)


def secure(script: str, **fields: Any) -> ContainerSpec:
    return shell(script, security=SecurityContext(**fields))


def _parameters() -> Iterator[str]:
    for name in ("crun", "runc"):
        yield f"{name}-cgroupfs"
        if Path("/run/systemd/system").is_dir():
            yield f"{name}-systemd"


@pytest.fixture(params=_parameters())
def machine(request: pytest.FixtureRequest) -> Iterator[Host]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    name, _, driver = request.param.partition("-")
    found = runtime.find().get(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    # Not pytest's: its parents are closed to the ids of a user namespace.
    with tempfile.TemporaryDirectory(prefix="crito-") as directory:
        Path(directory).chmod(0o711)
        yield from _machine(name, found, cgroup.Driver(driver), Path(directory))


def _machine(name: str, found: Path, driver: cgroup.Driver, directory: Path) -> Iterator[Host]:
    tried = runtime.Runtime(name, found, directory / "runtime", driver)
    own = f"critotest-{name}{os.getpid()}"
    parent = f"{own}.slice" if driver is cgroup.Driver.SYSTEMD else f"/{own}"
    canary = asyncio.run(tried.canary(directory, parent))
    if not canary.ok:
        pytest.skip(canary.reason)
    host = Host(
        directory=directory,
        runtime=tried,
        parent=parent,
        layers=[busybox_layer(directory / "layer")],
        rootfs=Rootfs(directory / "containers", directory / "run"),
        bundles=Bundles(directory / "run"),
        node=nodes.detect(),
        features=asyncio.run(tried.features()),
        pod=pod_environment(directory),
    )
    host.rootfs.prepare()
    if host.node.has_apparmor:
        host.node = replace(host.node, apparmor_default=f"critotest-{os.getpid()}")
        asyncio.run(lsm.load_apparmor_default(host.node.apparmor_default))
    try:
        yield host
    finally:
        host.close()


def busybox_layer(directory: Path) -> Path:
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox-static is not installed")
    for name in ("bin", "etc", "tmp", "root", "home/web", "data/inner"):
        (directory / name).mkdir(parents=True)
    directory.chmod(0o755)
    (directory / "tmp").chmod(0o1777)
    shutil.copy(busybox, directory / "bin/busybox")
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        if name != "busybox":
            (directory / "bin" / name).symlink_to("busybox")
    (directory / "etc/passwd").write_text(PASSWD)
    (directory / "etc/group").write_text(GROUP)
    (directory / "data/file").write_text("from the image")
    os.chown(directory / "data/file", 1000, 1001)
    (directory / "data/inner/link").symlink_to("../file")
    return directory


def pod_environment(directory: Path, mappings: UserNamespace | None = None) -> PodEnvironment:
    """A pod with pinned net, ipc and uts namespaces (and a user namespace that owns them), and its files."""
    files = directory / "pod"
    (files / "shm").mkdir(parents=True)
    mount.make_private_mountpoint(files)
    mount.tmpfs(files / "shm", 1 << 20, 0o1777)
    for name in ("resolv.conf", "hostname", "hosts"):
        (files / name).write_text(f"{name} of the pod\n")
    pinned = _pin(files, mappings)
    return PodEnvironment(
        sandbox_id=SandboxId("5" * 64),
        hostname="podhost",
        net_ns=pinned["net"],
        ipc_ns=pinned["ipc"],
        uts_ns=pinned["uts"],
        pid_ns="",
        user_ns=pinned.get("user", ""),
        cgroup_parent="",
        resolv_conf_path=str(files / "resolv.conf"),
        hostname_path=str(files / "hostname"),
        hosts_path=str(files / "hosts"),
        shm_path=str(files / "shm"),
        log_directory="",
        privileged=False,
        user_namespace=mappings,
    )


def _pin(directory: Path, mappings: UserNamespace | None) -> dict[str, str]:
    kinds = ["net", "ipc", "uts", *(["user"] if mappings else [])]
    script = "echo ready; exec sleep 60"
    argv = ["unshare", *(f"--{kind}" for kind in kinds), "sh", "-c", script]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "ready\n"
        if mappings:
            for name, lines in (("uid_map", mappings.uids), ("gid_map", mappings.gids)):
                text = "".join(f"{line.container_id} {line.host_id} {line.length}\n" for line in lines)
                Path(f"/proc/{maker.pid}/{name}").write_text(text)
        for kind in kinds:
            (directory / kind).touch()
            mount.bind(Path(f"/proc/{maker.pid}/ns/{kind}"), directory / kind)
        maker.kill()
    subprocess.run(["nsenter", f"--uts={directory / 'uts'}", "hostname", "podhost"], check=True)
    return {kind: str(directory / kind) for kind in kinds}
