"""The security modules AppArmor and SELinux: whether this host has them, their profiles and labels.

Where a module is missing, what a pod asks of SELinux is ignored, as Kubernetes documents it; an AppArmor profile that a
pod names is an error, because the pod would run unconfined.
"""

import asyncio
import contextlib
import errno
import hashlib
import os
from pathlib import Path

from oci.container_spec import Profile, ProfileKind, SELinuxLabel
from oci.errors import FailedPrecondition, InvalidArgument, Unavailable

APPARMOR_DEFAULT = "crito-default"

_SELINUX_XATTR = "security.selinux"
_PARSERS = ("/usr/sbin/apparmor_parser", "/sbin/apparmor_parser")

# What the runtime-spec's masked paths and the default capabilities forbid, once more; and signals and ptrace only among
# the containers of this profile. Written for apparmor_parser(8) of AppArmor 3 and later.
_APPARMOR_TEMPLATE = """\
abi <abi/3.0>,
#include <tunables/global>
profile {name} flags=(attach_disconnected,mediate_deleted) {{
  #include <abstractions/base>
  network,
  capability,
  file,
  umount,
  signal (receive) peer=unconfined,
  signal (receive) peer={{runc,crun,/usr/bin/runc,/usr/bin/crun,/usr/sbin/runc,/usr/sbin/crun}},
  signal (send,receive) peer={name},
  deny @{{PROC}}/sysrq-trigger rwklx,
  deny @{{PROC}}/kcore rwklx,
  deny mount,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,
  ptrace (trace,read,tracedby,readby) peer={name},
}}
"""


def has_apparmor(sys: Path = Path("/sys")) -> bool:
    try:
        enabled = (sys / "module/apparmor/parameters/enabled").read_text().strip() == "Y"
    except OSError:
        return False
    return enabled and (sys / "kernel/security/apparmor").is_dir()


def apparmor_profiles(sys: Path = Path("/sys")) -> frozenset[str]:
    """The names of the profiles that are loaded; a line there is "NAME (MODE)"."""
    try:
        text = (sys / "kernel/security/apparmor/profiles").read_text()
    except FileNotFoundError:
        return frozenset()
    return frozenset(line.rpartition(" (")[0] for line in text.splitlines())


def apparmor_profile(wanted: Profile | None, has: bool, default: str, loaded: frozenset[str] | None = None) -> str:
    """process.apparmorProfile; "" for none. `loaded` None: not known, the runtime will say when one is missing."""
    if wanted is None or wanted.kind is ProfileKind.RUNTIME_DEFAULT:
        return default if has else ""
    if wanted.kind is ProfileKind.UNCONFINED:
        return "unconfined" if has else ""
    name = wanted.localhost
    if not name:
        raise InvalidArgument("apparmor profile: localhost_ref is empty")
    if not has:
        raise FailedPrecondition(f"apparmor profile {name!r}: this host has no AppArmor")
    if loaded is not None and name not in loaded:
        raise FailedPrecondition(f"apparmor profile {name!r} is not loaded on this host")
    return name


async def load_apparmor_default(name: str = APPARMOR_DEFAULT, timeout_s: float = 30.0) -> None:
    """Load Crito's default profile into the kernel, over one of that name; Unavailable says why it could not."""
    what = f"cannot load the AppArmor profile {name}"
    parser = next((path for path in _PARSERS if os.access(path, os.X_OK)), None)
    if parser is None:
        raise Unavailable(f"{what}: there is no apparmor_parser at {' or '.join(_PARSERS)}")
    process = await asyncio.create_subprocess_exec(
        parser,
        "--replace",
        "--write-cache",
        "--quiet",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
    )
    try:
        profile = _APPARMOR_TEMPLATE.format(name=name).encode()
        output, _ = await asyncio.wait_for(process.communicate(profile), timeout_s)
    except TimeoutError:
        raise Unavailable(f"{what}: {parser} took longer than {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode != 0:
        raise Unavailable(f"{what}: {parser}: {output.decode(errors='replace').strip()}")


def has_selinux(sys: Path = Path("/sys")) -> bool:
    return (sys / "fs/selinux/enforce").exists()


def process_label(wanted: SELinuxLabel | None, sandbox_id: str) -> str:
    """The label of a pod's or container's processes; what is not given is a confined container's."""
    wanted = wanted or SELinuxLabel()
    level = wanted.level or pod_level(sandbox_id)
    return f"{wanted.user or 'system_u'}:{wanted.role or 'system_r'}:{wanted.type or 'container_t'}:{level}"


def mount_label(wanted: SELinuxLabel | None, sandbox_id: str) -> str:
    """The label of the files that such processes may use."""
    level = wanted.level if wanted and wanted.level else pod_level(sandbox_id)
    return f"system_u:object_r:container_file_t:{level}"


def pod_level(sandbox_id: str) -> str:
    """Two categories that keep a pod's files from other pods: drawn from its id, so nothing needs to be remembered."""
    digest = int.from_bytes(hashlib.sha256(sandbox_id.encode()).digest()[:8], "big")
    first, second = digest % 1024, digest // 1024 % 1023
    second += second >= first
    return f"s0:c{min(first, second)},c{max(first, second)}"


def relabel(path: Path, label: str) -> int:
    """Give everything below `path` the label, but for what has it; the number of files changed.

    A tree whose top has the label is taken as done: the top is labelled last, so an interrupted walk starts over.
    """
    wanted = label.encode() + b"\0"
    if _label(str(path)) == wanted:
        return 0
    changed = 0
    for directory, names, files in os.walk(path):
        for name in (*names, *files):
            changed += _relabel_one(f"{directory}/{name}", wanted)
    return changed + _relabel_one(str(path), wanted)


def _relabel_one(path: str, wanted: bytes) -> int:
    if _label(path) == wanted:
        return 0
    try:
        os.setxattr(path, _SELINUX_XATTR, wanted, follow_symlinks=False)
    except OSError as error:
        # Read-only files and file systems without labels (NFS) stay as they are: the mount's own label counts there.
        if error.errno in (errno.ENOTSUP, errno.EROFS, errno.ENOENT):
            return 0
        raise
    return 1


def _label(path: str) -> bytes | None:
    try:
        return os.getxattr(path, _SELINUX_XATTR, follow_symlinks=False)
    except OSError:
        return None
