"""Who a container's process runs as: names resolved in the container's own /etc/passwd and /etc/group."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from oci.container_spec import SecurityContext
from oci.errors import InvalidArgument
from oci.linux import syscalls

_LIMIT_BYTES = 16 << 20  # nobody has more users; an image that has is not read into our memory
_LARGEST_ID = (1 << 32) - 2  # -1 is "no change" to the kernel


@dataclass(frozen=True, slots=True)
class User:
    """The ids of a container's first process; `additional_gids` is sorted and holds the primary one too."""

    uid: int
    gid: int
    additional_gids: tuple[int, ...]
    home: str = ""  # "" where /etc/passwd does not say


@dataclass(frozen=True, slots=True)
class _Account:
    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True, slots=True)
class _Group:
    name: str
    gid: int
    members: tuple[str, ...]


def resolve(rootfs: Path, image_user: str, security: SecurityContext) -> User:
    """The user that the CRI asks for, else the image's, else root.

    Raises InvalidArgument for a name that the image does not know, and for a group without a user. An id needs no
    entry: its group is then 0. Source: api.proto, LinuxContainerSecurityContext; OCI image-spec, config.md, "User".
    """
    if security.run_as_group is not None and security.run_as_user is None and not security.run_as_username:
        raise InvalidArgument("run_as_group is set without run_as_user or run_as_username")
    root_fd = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        accounts, groups = list(_accounts(root_fd)), list(_groups(root_fd))
    finally:
        os.close(root_fd)
    account, gid = _primary(image_user, security, accounts, groups)
    return User(account.uid, gid, _additional(account.name, gid, security, groups), account.home)


def _primary(
    image_user: str, security: SecurityContext, accounts: list[_Account], groups: list[_Group]
) -> tuple[_Account, int]:
    if security.run_as_user is not None:
        account = _by_uid(_checked_id("run_as_user", security.run_as_user), accounts)
    elif security.run_as_username:
        account = _by_name("run_as_username", security.run_as_username, accounts)
    else:
        return _of_image(image_user, accounts, groups)
    if security.run_as_group is not None:
        return account, _checked_id("run_as_group", security.run_as_group)
    return account, account.gid


def _of_image(user: str, accounts: list[_Account], groups: list[_Group]) -> tuple[_Account, int]:
    name, _, group = user.partition(":")
    if not name:
        account = _by_uid(0, accounts)
    elif _is_id(name) and not any(known.name == name for known in accounts):
        account = _by_uid(_checked_id("the image's user", int(name)), accounts)
    else:
        account = _by_name("the image's user", name, accounts)
    if not group:
        return account, account.gid
    known = next((known for known in groups if known.name == group), None)
    if known is not None:
        return account, known.gid
    if not _is_id(group):
        raise InvalidArgument(f"the image's user {user!r}: its /etc/group has no group {group!r}")
    return account, _checked_id("the image's group", int(group))


def _additional(name: str, gid: int, security: SecurityContext, groups: list[_Group]) -> tuple[int, ...]:
    found = {gid, *(_checked_id("supplemental_groups", given) for given in security.supplemental_groups)}
    if name and not security.strict_supplemental_groups:
        found.update(group.gid for group in groups if name in group.members)
    return tuple(sorted(found))


def _by_uid(uid: int, accounts: list[_Account]) -> _Account:
    found = next((account for account in accounts if account.uid == uid), None)
    return found or _Account("", uid, 0, "/root" if uid == 0 else "/")


def _by_name(what: str, name: str, accounts: list[_Account]) -> _Account:
    for account in accounts:
        if account.name == name:
            return account
    raise InvalidArgument(f"{what} {name!r}: the image's /etc/passwd has no such user")


def _checked_id(what: str, value: int) -> int:
    if not 0 <= value <= _LARGEST_ID:
        raise InvalidArgument(f"{what} {value}: not between 0 and {_LARGEST_ID}")
    return value


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _accounts(root_fd: int) -> Iterator[_Account]:
    for fields in _lines(root_fd, "etc/passwd"):
        if len(fields) >= 4 and _is_id(fields[2]) and _is_id(fields[3]):
            yield _Account(fields[0], int(fields[2]), int(fields[3]), fields[5] if len(fields) > 5 else "")


def _groups(root_fd: int) -> Iterator[_Group]:
    for fields in _lines(root_fd, "etc/group"):
        if len(fields) >= 3 and _is_id(fields[2]):
            members = tuple(filter(None, fields[3].split(","))) if len(fields) > 3 else ()
            yield _Group(fields[0], int(fields[2]), members)


def _lines(root_fd: int, name: str) -> Iterator[list[str]]:
    """The fields of each line; nothing where there is no such file. A FIFO or device in its place is not waited for."""
    try:
        with syscalls.opened_in_root(root_fd, name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY) as fd:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return
            with open(fd, errors="surrogateescape", closefd=False) as file:
                text = file.read(_LIMIT_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            yield line.strip().split(":")
