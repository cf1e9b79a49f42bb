"""File systems of a test's own that keep account of projects, in files."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from oci.linux import mount, project_quota

MAKE = {"xfs": ["mkfs.xfs", "-q"], "ext4": ["mkfs.ext4", "-q", "-O", "project,quota", "-E", "quotatype=prjquota"]}
_SIZE_BYTES = 512 << 20


@contextmanager
def accounted_disk(kind: str, image: Path, at: Path) -> Iterator[None]:
    """One of `kind` mounted on `at`; skips the test where this machine has none."""
    command = MAKE[kind]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    with image.open("wb") as file:
        file.truncate(_SIZE_BYTES)
    subprocess.run([*command, str(image)], check=True)
    mounted = subprocess.run(["mount", "-o", "loop,prjquota", str(image), str(at)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"this kernel mounts no {kind} with project quotas")
    try:
        if project_quota.usage(at, 0) is None:
            pytest.skip(f"this kernel keeps no account of projects on {kind}")
        yield
    finally:
        mount.unmount_below(at)
