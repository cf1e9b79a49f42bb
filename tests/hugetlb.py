"""Mounts the hugetlb v1 hierarchy for a while, because crun refuses a hybrid host whose v2 hierarchy has a controller.

Several test runs may need it at once: all hold a shared lock, and the last to go puts things back as they were.
Unmounted while something still holds it, a v1 hierarchy lingers in the kernel without a mount, and readers of
/proc/cgroups break. Mounting it again cures that, so a lingering one is left mounted.
"""

import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

HIERARCHY = Path("/sys/fs/cgroup/hugetlb")
UNIFIED = Path("/sys/fs/cgroup/unified/cgroup.controllers")
USERS = Path("/run/lock/crito-tests-hugetlb")
MUTEX = Path("/run/lock/crito-tests-hugetlb.mutex")
LINGER_TIMEOUT_S = 3.0


@contextlib.contextmanager
def hugetlb_hierarchy() -> Iterator[None]:
    """Does nothing where crun does not need it, or where only its owner may mount."""
    if os.geteuid() != 0 or not _is_needed():
        yield
        return
    USERS.parent.mkdir(parents=True, exist_ok=True)
    with USERS.open("a+") as users:
        with _alone():
            if not HIERARCHY.is_mount():
                HIERARCHY.mkdir(exist_ok=True)
                subprocess.run(["mount", "-t", "cgroup", "-o", "hugetlb", "cgroup", HIERARCHY], check=True)
                users.write("mounted by tests\n")
                users.flush()
            fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield
        finally:
            with _alone(), contextlib.suppress(BlockingIOError):  # others still need it
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                users.seek(0)
                if users.read():
                    _put_back()
                    users.truncate(0)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Only one run at a time mounts or unmounts; held for that long only."""
    with MUTEX.open("a") as mutex:
        fcntl.flock(mutex, fcntl.LOCK_EX)
        yield


def _is_needed() -> bool:
    return HIERARCHY.is_mount() or (UNIFIED.exists() and "hugetlb" in UNIFIED.read_text().split())


def _put_back() -> None:
    if any(each.is_dir() for each in HIERARCHY.iterdir()):
        return  # somebody's cgroups are there, so it is in use
    subprocess.run(["umount", HIERARCHY], check=True)
    deadline = time.monotonic() + LINGER_TIMEOUT_S
    while _lingers():
        if time.monotonic() > deadline:
            subprocess.run(["mount", "-t", "cgroup", "-o", "hugetlb", "cgroup", HIERARCHY], check=True)
            return
        time.sleep(0.05)
    HIERARCHY.rmdir()


def _lingers() -> bool:
    """Whether /proc/cgroups still has hugetlb in a hierarchy other than v2's, which is number 0."""
    rows = (line.split() for line in Path("/proc/cgroups").read_text().splitlines())
    return any(row[0] == "hugetlb" and row[1] != "0" for row in rows)
