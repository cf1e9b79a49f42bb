"""Cgroups of the tests' own, in the form of the host's cgroup driver: the daemon's default."""

import subprocess
from pathlib import Path

HAS_SYSTEMD = Path("/run/systemd/system").is_dir()


def parent(name: str) -> str:
    """A cgroup below the root, named by the last element of its path; with systemd a slice."""
    return f"{name.replace('-', '_')}.slice" if HAS_SYSTEMD else name


def below(parent: str, name: str) -> str:
    """The path of a cgroup below such a parent, as a pod's cgroup_parent and as it lies in every hierarchy."""
    if not HAS_SYSTEMD:
        return f"/{parent}/{name}"
    return f"/{parent}/{parent.removesuffix('.slice')}-{name.replace('-', '_')}.slice"


def container(parent: str, name: str) -> str:
    """A cgroup for one container below such a parent, as a runtime-spec's cgroupsPath."""
    return f"{parent}:tests:{name}" if HAS_SYSTEMD else f"/{parent}/{name}"


def make(path: str) -> None:
    """Make the cgroup in every hierarchy, as the kubelet does."""
    if HAS_SYSTEMD:
        subprocess.run(["systemctl", "start", path.rpartition("/")[2]], check=True)
        return
    for hierarchy in hierarchies():
        (hierarchy / path.strip("/")).mkdir(parents=True, exist_ok=True)


def remove(path: str) -> None:
    """Remove an empty cgroup; that it is gone already is success."""
    if HAS_SYSTEMD:
        subprocess.run(["systemctl", "stop", path.rpartition("/")[2]], check=False, capture_output=True)
        return
    for hierarchy in hierarchies():
        directory = hierarchy / path.strip("/")
        if directory.is_dir():
            directory.rmdir()


def hierarchies() -> list[Path]:
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [Path(fields[4]) for fields in lines if fields[fields.index("-") + 1] in ("cgroup", "cgroup2")]
