"""`crito check`: what this host has and lacks for running pods, each with what was seen and what it means.

Nothing stays of what is tried. A finding that is REQUIRED and absent means that pods could not run: exit status 1.
"""

import asyncio
import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

from cri.config import CgroupDriver, Config, RuntimeHandler
from cri.config_reader import EXECUTABLE_DIRS, PAUSE_PROGRAMS, find_executable
from cri.image_service import additional, policy
from cri.runtimes import runtime_of
from oci.cdi import Cdi
from oci.criu import Criu
from oci.errors import Error
from oci.hook_files import HookFiles
from oci.linux import cgroup, lsm, mount, project_quota, syscalls
from oci.linux.cgroup import Cgroups, Version
from oci.linux.node import Node
from oci.linux.node import detect as detect_node
from oci.runtime import Canary
from sandbox.network.conflist import read_directory
from sandbox.network.plugin import Plugins

MIN_KERNEL = (5, 12)  # mount_setattr with id maps; pidfd, openat2 and the new mount API are older
CONTROLLERS = ("cpu", "cpuset", "memory", "pids")
CAPABILITIES = (
    "SYS_ADMIN",
    "NET_ADMIN",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "DAC_OVERRIDE",
    "SETUID",
    "SETGID",
    "KILL",
    "MKNOD",
)
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
_NO_CRIU = "containers cannot be checkpointed or restored; everything else works"
TMPFS_MAGIC = 0x01021994


class Weight(StrEnum):
    REQUIRED = "required"  # without it no pod can run
    SOME = "some pods"  # without it pods that ask for it fail, with a clear error
    ADVICE = "advice"


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    ok: bool
    weight: Weight
    seen: str
    meaning: str = ""  # of its absence; empty where there is nothing to say


def main(config: Config, *, as_json: bool) -> int:
    findings = list(examine(config))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(text(findings))
    return 0 if can_run(findings) else 1


def can_run(findings: Iterable[Finding]) -> bool:
    return all(finding.ok for finding in findings if finding.weight is Weight.REQUIRED)


def text(findings: list[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{'✓' if finding.ok else '✗'} {finding.name.ljust(width)}  {finding.seen}")
        if not finding.ok and finding.meaning:
            lines.append(f"  {' ' * width}  → {finding.meaning}")
    lines += ["", "Pods can run here." if can_run(findings) else "Pods cannot run here: see the lines marked ✗."]
    return "\n".join(lines)


def examine(config: Config) -> Iterator[Finding]:
    node = detect_node()
    cgroups = node.cgroups
    yield from _process(node)
    yield _kernel(os.uname().release)
    yield from _namespaces(Path("/proc/self/ns"), Path("/proc/sys/user/max_user_namespaces"))
    yield _overlay(config.crito.root)
    yield _accounts(config.crito.root)
    yield from _cgroups(cgroups, config.runtime.cgroup_driver)
    yield from _runtimes(config)
    yield from _described(config)
    yield from _policies(config)
    yield from _image_stores(config)
    yield from _pause(config)
    yield _criu(config)
    yield from _network(config)
    yield from _security(node)
    yield from _directories(config)


def _process(node: Node) -> Iterator[Finding]:
    root = os.geteuid() == 0
    yield Finding(
        "root",
        root,
        Weight.REQUIRED,
        "running as root" if root else f"uid {os.geteuid()}",
        "run this, and the daemon, as root",
    )
    missing = [name for name in CAPABILITIES if name not in node.capabilities]
    yield Finding(
        "capabilities",
        not missing,
        Weight.REQUIRED,
        f"lacks {', '.join(missing)}" if missing else f"{len(node.capabilities)} in the bounding set",
        "namespaces, mounts and networks cannot be made",
    )
    has = "SYS_RESOURCE" in node.capabilities
    yield Finding(
        "CAP_SYS_RESOURCE",
        has,
        Weight.ADVICE,
        "held" if has else "missing",
        f"oom_score_adj below {node.lowest_oom_score_adj} and limits above the daemon's own are clamped",
    )


def _kernel(release: str) -> Finding:
    version = tuple(int(digits) for digits in re.findall(r"\d+", release)[:2])
    wanted = ".".join(map(str, MIN_KERNEL))
    return Finding("kernel", version >= MIN_KERNEL, Weight.REQUIRED, release, f"Linux {wanted} or newer is needed")


def _namespaces(directory: Path, max_user: Path) -> Iterator[Finding]:
    missing = [name for name in NAMESPACES if name != "user" and not (directory / name).exists()]
    yield Finding(
        "namespaces",
        not missing,
        Weight.REQUIRED,
        f"lacks {', '.join(missing)}" if missing else ", ".join(NAMESPACES),
        "the kernel was built without them",
    )
    limit = int(max_user.read_text()) if max_user.exists() else 0
    usable = limit > 0 and (directory / "user").exists()
    yield Finding(
        "user namespaces",
        usable,
        Weight.SOME,
        f"up to {limit}" if usable else "none",
        "pods with hostUsers: false are refused (sysctl user.max_user_namespaces)",
    )


def _overlay(root: Path) -> Finding:
    """Mounts a real overlay on the file system that `root` is on."""
    existing = _existing(root)
    try:
        with tempfile.TemporaryDirectory(prefix=".crito-check-", dir=existing) as name:
            top = Path(name)
            for each in ("lower", "upper", "work", "merged"):
                (top / each).mkdir()
            mount.overlay(top / "merged", [top / "lower"], top / "upper", top / "work")
            mount.unmount(top / "merged")
    except OSError as error:
        meaning = "containers get their root file systems by it; crito.root must be on a file system that it takes"
        return Finding("overlayfs", False, Weight.REQUIRED, f"cannot be mounted in {existing}: {error}", meaning)
    return Finding("overlayfs", True, Weight.REQUIRED, f"works in {existing}")


def _accounts(root: Path) -> Finding:
    existing = _existing(root)
    has = project_quota.usage(existing, 0) is not None
    seen = f"{'accounted for' if has else 'not on the file system'} of {existing}"
    meaning = "what containers have written is counted by walking it in the background: mount it with prjquota"
    return Finding("project quotas", has, Weight.ADVICE, seen, meaning)


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.is_dir())


def _cgroups(cgroups: Cgroups, driver: CgroupDriver) -> Iterator[Finding]:
    yield Finding(
        "cgroups",
        bool(cgroups.hierarchies),
        Weight.REQUIRED,
        f"{cgroups.version}" if cgroups.hierarchies else "none mounted",
        "mount cgroup v2 on /sys/fs/cgroup",
    )
    missing = [name for name in CONTROLLERS if name not in cgroups.controllers]
    yield Finding(
        "cgroup controllers",
        not missing,
        Weight.SOME,
        f"lacks {', '.join(missing)}" if missing else ", ".join(sorted(_named(cgroups.controllers))),
        "limits that need them are refused by the OCI runtime",
    )
    bus = Path("/run/systemd/system").is_dir()
    if driver is CgroupDriver.SYSTEMD:
        yield Finding(
            "cgroup driver",
            bus,
            Weight.REQUIRED,
            "systemd" if bus else "systemd is configured, and does not run here",
            "set runtime.cgroup_driver to cgroupfs, for kubelet too",
        )
    else:
        seen = "cgroupfs, although systemd runs here" if bus else "cgroupfs"
        meaning = "two managers of one tree get in each other's way: use systemd's, for kubelet too"
        yield Finding("cgroup driver", not (bus and cgroups.version is Version.V2), Weight.ADVICE, seen, meaning)


def _named(controllers: frozenset[str]) -> list[str]:
    return [name for name in controllers if "=" not in name]


def _runtimes(config: Config) -> Iterator[Finding]:
    canaries = asyncio.run(_canaries(config))
    for name, (version, canary) in canaries.items():
        configured = config.runtime.default_handler in ("", name)
        seen = f"{version} at {config.runtime.handlers[name].path}"
        if canary.ok:
            yield Finding(
                f"runtime {name}", True, Weight.ADVICE, f"{seen} ran a container in {canary.seconds * 1e3:.0f} ms"
            )
        else:
            weight = Weight.ADVICE if configured else Weight.SOME
            yield Finding(f"runtime {name}", False, weight, f"{seen}: {canary.reason}", _runtime_cure(canary.reason))
    for name, handler in config.runtime.handlers.items():
        if handler.path.name == "runsc" and not handler.sandbox_by_runtime:
            seen = "each container gets a sandbox of its own, and they cannot share the pod's network"
            yield Finding(f"runtime {name}", False, Weight.SOME, seen, "set its sandbox_by_runtime to true")
    chosen = config.runtime.default_handler or next((name for name, (_, each) in canaries.items() if each.ok), "")
    works = chosen in canaries and canaries[chosen][1].ok
    seen = (
        f"{chosen}{' (configured)' if config.runtime.default_handler else ''}" if chosen else "none can run a container"
    )
    yield Finding("default runtime", works, Weight.REQUIRED, seen, "install crun or runc")


def _runtime_cure(reason: str) -> str:
    if "hybrid" in reason:
        return "crun wants no controller in cgroup v2 on a hybrid host: mount that controller's v1 hierarchy"
    return "pods with this handler fail; without default_handler another one is the default"


async def _canaries(config: Config) -> dict[str, tuple[str, Canary]]:
    return {name: await _canary(name, handler, config) for name, handler in config.runtime.handlers.items()}


async def _canary(name: str, handler: RuntimeHandler, config: Config) -> tuple[str, Canary]:
    """The runtime's version and whether it can run a container, in directories that do not stay."""
    driver = cgroup.Driver(config.runtime.cgroup_driver)
    with tempfile.TemporaryDirectory(prefix="crito-check-", dir=_existing(config.crito.root)) as directory:
        runtime = runtime_of(name, handler, Path(directory) / "state", driver)
        canary = await runtime.canary(Path(directory), cgroup.check_parent(driver, ""))
        version = "?"
        with contextlib.suppress(Error):
            version = await runtime.version()
    return version, canary


def _described(config: Config) -> Iterator[Finding]:
    """The files by which vendors and administrators have a say in containers."""
    for name, weight, files, meaning in (
        ("CDI devices", Weight.SOME, Cdi(config.runtime.cdi_spec_dirs), "pods that ask for these devices are refused"),
        ("OCI hooks", Weight.REQUIRED, HookFiles(config.runtime.hooks_dir), "every container is refused until then"),
    ):
        unusable = files.unusable()
        seen = "; ".join(f"{path}: {why}" for path, why in unusable.items())
        yield Finding(name, not unusable, weight, seen or "every file can be used", f"mend or remove it: {meaning}")


def _policies(config: Config) -> Iterator[Finding]:
    """The files that decide which images may run; they refuse where they are wrong."""
    directory = config.image.policy_dir
    own = sorted(directory.glob("*.json")) if directory.is_dir() else []
    wrong, needs_gpgv = [], False
    for path in (config.image.policy, *own):
        try:
            needs_gpgv |= bool(policy.demanded_of_any(path).signed_by)
        except Error as error:
            wrong.append(str(error).partition(": ")[2])
    seen = "; ".join(wrong) or "every file can be used"
    yield Finding("image policies", not wrong, Weight.SOME, seen, "images that these files decide on are refused")
    if needs_gpgv:
        program = find_executable("gpgv", EXECUTABLE_DIRS)
        yield Finding(
            "gpgv",
            program is not None,
            Weight.SOME,
            str(program or "not found"),
            "a policy demands OpenPGP signatures: images are refused until it is installed",
        )


def _image_stores(config: Config) -> Iterator[Finding]:
    for store in additional.examine(config.image.additional_image_stores):
        seen = f"{store.path}: {store.trouble or f'{store.images} images'}"
        yield Finding("image store", not store.trouble, Weight.SOME, seen, "what it lacks must be pulled")


def _pause(config: Config) -> Iterator[Finding]:
    path = config.runtime.pause_path
    if path is None:
        seen = "built in"
        meaning = f"a pause costs 0.3 MB instead of 0.05 MB: install {' or '.join(PAUSE_PROGRAMS)}"
        yield Finding("pause", False, Weight.ADVICE, seen, meaning)
    else:
        yield Finding(
            "pause", os.access(path, os.X_OK), Weight.REQUIRED, str(path), "runtime.pause_path is no executable"
        )


def _criu(config: Config) -> Finding:
    criu = Criu(config.runtime.criu_path)
    driver = cgroup.Driver(config.runtime.cgroup_driver)
    runtimes = [
        name
        for name, handler in config.runtime.handlers.items()
        if asyncio.run(runtime_of(name, handler, handler.root, driver).can_checkpoint())
    ]
    try:
        asyncio.run(criu.require())
    except Error as error:
        return Finding("CRIU", False, Weight.SOME, str(error), _NO_CRIU)
    seen = f"{criu.path}, with {', '.join(runtimes) or 'no configured OCI runtime'}"
    return Finding("CRIU", bool(runtimes), Weight.SOME, seen, _NO_CRIU)


def _network(config: Config) -> Iterator[Finding]:
    directory = read_directory(config.network.conf_dir)
    names = [network.name for network in directory.networks]
    wanted = config.network.default_network
    yield Finding(
        "CNI configuration",
        wanted in names if wanted else bool(names),
        Weight.SOME,
        ", ".join(names) or "; ".join(directory.problems) or f"{config.network.conf_dir} is empty",
        f'no network "{wanted}"' if wanted and names else "pods without hostNetwork wait until a network is configured",
    )
    for problem in directory.problems if names else ():
        yield Finding("CNI file", False, Weight.ADVICE, problem, "the file is left out")
    plugins = Plugins(config.network.plugin_dirs, config.network.timeout)
    yield from (_plugins(plugins, network.name, network.plugins) for network in directory.networks)
    forward = Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1"
    yield Finding(
        "IP forwarding",
        forward,
        Weight.ADVICE,
        f"net.ipv4.ip_forward = {int(forward)}",
        "pods reach nothing outside of this node, unless the CNI plugin sets it",
    )


def _plugins(plugins: Plugins, network: str, configured: Iterable[object]) -> Finding:
    types = [str(each.get("type")) for each in configured if isinstance(each, dict)]
    missing = [name for name in types if not _is_found(partial(plugins.find, name))]
    directories = ", ".join(map(str, plugins.directories))
    seen = f"{', '.join(missing)} not in {directories}" if missing else ", ".join(types)
    return Finding(f"CNI plugins of {network}", not missing, Weight.SOME, seen, "pods of this network cannot start")


def _is_found(find: Callable[[], Path]) -> bool:
    try:
        find()
    except Error:
        return False
    return True


def _security(node: Node) -> Iterator[Finding]:
    actions = Path("/proc/sys/kernel/seccomp/actions_avail")
    yield Finding(
        "seccomp",
        actions.exists(),
        Weight.SOME,
        "filters" if actions.exists() else "not in this kernel",
        "pods with a seccomp profile, also RuntimeDefault, fail",
    )
    for name, has in (("AppArmor", node.has_apparmor), ("SELinux", node.has_selinux)):
        seen = "enabled" if has else "not in this kernel, or disabled"
        yield Finding(name, has, Weight.SOME, seen, f"pods that name {name} options are refused")
    if node.has_apparmor:
        parser = find_executable("apparmor_parser", EXECUTABLE_DIRS)
        loaded = lsm.APPARMOR_DEFAULT in lsm.apparmor_profiles()
        seen = f"{lsm.APPARMOR_DEFAULT} {'is' if loaded else 'is not yet'} loaded; {parser or 'no apparmor_parser'}"
        yield Finding("AppArmor profile", bool(parser or loaded), Weight.SOME, seen, "install apparmor")


def _directories(config: Config) -> Iterator[Finding]:
    for name, path in (("crito.root", config.crito.root), ("crito.run_dir", config.crito.run_dir)):
        existing = _existing(path)
        free = os.statvfs(existing)
        writable = os.access(existing, os.W_OK) and not free.f_flag & os.ST_RDONLY
        seen = f"{path}: {free.f_bavail * free.f_frsize / 1e9:.1f} GB free" if writable else f"{existing} is read-only"
        yield Finding(name, writable, Weight.REQUIRED, seen, "the daemon writes there")
    existing = _existing(config.crito.run_dir)
    is_tmpfs = syscalls.statfs(existing).f_type == TMPFS_MAGIC
    seen = f"{existing} is {'on a tmpfs' if is_tmpfs else 'on a disk'}"
    yield Finding("run_dir in memory", is_tmpfs, Weight.ADVICE, seen, "a full disk can lose exit codes")
