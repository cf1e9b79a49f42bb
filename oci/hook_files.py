"""OCI hooks directories: files by which a node's administrator has hooks put into the containers that match.

Source: oci-hooks(5), both of its schemas. The directories are read anew at every use; files that have not changed are
not parsed again. A file that is wrong refuses containers instead of being left out: nobody knows for which of them its
hook was meant, and a device or a rule may hang on it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from oci.cdi_edits import Config, add_hook
from oci.errors import FailedPrecondition
from oci.linux.regex import Expression
from oci.parsed_files import ParsedFiles

_STAGES = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
_LARGEST_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Asked:
    """What conditions look at: the container as its pod asks for it."""

    command: str  # process.args[0]
    annotations: Mapping[str, str]
    has_bind_mounts: bool


@dataclass(frozen=True, slots=True)
class HookFile:
    """One file: a hook of the runtime-spec, its stages, and when it is for a container."""

    hook: Mapping[str, Any]
    stages: tuple[str, ...]
    conditions: tuple["_Condition", ...]
    is_any_enough: bool  # as the 0.1.0 schema has it; else all conditions must hold

    def is_for(self, asked: Asked) -> bool:
        """Without a condition it is for none."""
        held = [condition.holds(asked) for condition in self.conditions]
        return any(held) if self.is_any_enough else bool(held) and all(held)


class HookFiles:
    """The hooks in `directories`: a file in a later one masks the file of that name in an earlier one."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = tuple(directories)
        self._parsed = ParsedFiles(lambda _path, text: parse(text), (".json",), _LARGEST_FILE)

    def inject(self, config: Mapping[str, Any], annotations: Mapping[str, str], has_bind_mounts: bool) -> Config:
        """The runtime-spec with the hooks for it; reads files, so not for the event loop.

        Raises FailedPrecondition for a file that is wrong, and for a hook whose program is not there.
        """
        made = dict(config)
        asked = Asked(config["process"]["args"][0], annotations, has_bind_mounts)
        for path, file in self._files():
            if isinstance(file, str):
                raise FailedPrecondition(f"OCI hook {path}: {file}: mend or remove it, no container is made without it")
            if file.is_for(asked):
                program = str(file.hook["path"])
                if not os.access(program, os.X_OK):
                    raise FailedPrecondition(f"OCI hook {path}: {program} cannot be executed or is not there")
                for stage in file.stages:
                    add_hook(made, stage, dict(file.hook))
        return made

    def unusable(self) -> dict[Path, str]:
        """The files that are no hooks, with the reasons."""
        return {path: file for path, file in self._files() if isinstance(file, str)}

    def _files(self) -> list[tuple[Path, HookFile | str]]:
        """In the order in which they are injected."""
        unread: dict[Path, str] = {}
        by_name = {path.name: path for each in self._directories for path in self._parsed.listed(each, unread)}
        names = sorted(by_name, key=lambda name: (name.lower(), name))
        return [*unread.items(), *self._parsed.read(by_name[name] for name in names).items()]


def parse(text: bytes) -> HookFile | str:
    """The hook, or why it is none."""
    try:
        version = msgspec.json.decode(text, type=_Versioned).version
        if version == "1.0.0":
            return _from_1_0_0(msgspec.json.decode(text, type=_File))
        if version in ("", "0.1.0"):
            return _from_0_1_0(msgspec.json.decode(text, type=_OldFile))
        return f"version {version[:50]!r}: expected 1.0.0"
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return str(error)[:300]
    except ValueError as error:
        return str(error)[:300]


# Conditions


@dataclass(frozen=True, slots=True)
class _Condition:
    """One of `when`; of those that have alternatives one must match."""

    always: bool | None = None
    bind_mounts: bool | None = None
    annotation: tuple[Expression, Expression] | None = None  # of a name and of its value
    commands: tuple[Expression, ...] = ()

    def holds(self, asked: Asked) -> bool:
        if self.always is not None:
            return self.always
        if self.bind_mounts is not None:
            return self.bind_mounts and asked.has_bind_mounts
        if self.annotation is not None:
            name, value = self.annotation
            return any(name.matches(each) and value.matches(asked.annotations[each]) for each in asked.annotations)
        return any(command.matches(asked.command) for command in self.commands)


# The files' own shapes; what else they hold means nothing


class _Versioned(msgspec.Struct):
    version: str = ""


class _Hook(msgspec.Struct, frozen=True, omit_defaults=True):
    """Source: OCI runtime-spec, config.md, "POSIX-platform Hooks"."""

    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: int | None = None


class _When(msgspec.Struct, frozen=True, rename="camel"):
    always: bool | None = None
    annotations: dict[str, str] | None = None
    commands: tuple[str, ...] | None = None
    has_bind_mounts: bool | None = None


class _File(msgspec.Struct, frozen=True):
    hook: _Hook
    when: _When
    stages: tuple[str, ...]


class _OldFile(msgspec.Struct, frozen=True):
    hook: str
    arguments: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    stage: tuple[str, ...] = ()
    cmds: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    annotations: tuple[str, ...] = ()
    annotation: tuple[str, ...] = ()
    hasbindmounts: bool = False


def _from_1_0_0(file: _File) -> HookFile:
    when, conditions = file.when, []
    if when.always is not None:
        conditions.append(_Condition(always=when.always))
    if when.has_bind_mounts is not None:
        conditions.append(_Condition(bind_mounts=when.has_bind_mounts))
    for name, value in (when.annotations or {}).items():
        conditions.append(_Condition(annotation=(Expression(name), Expression(value))))
    if when.commands:
        conditions.append(_Condition(commands=tuple(map(Expression, when.commands))))
    return HookFile(_checked(file.hook), _stages(file.stages), tuple(conditions), False)


def _from_0_1_0(file: _OldFile) -> HookFile:
    for one, other in (("stages", "stage"), ("cmds", "cmd"), ("annotations", "annotation")):
        if getattr(file, one) and getattr(file, other):
            raise ValueError(f"{one} and {other}: expected one of them")
    conditions = [_Condition(commands=(Expression(each),)) for each in file.cmds or file.cmd]
    for each in file.annotations or file.annotation:
        conditions.append(_Condition(annotation=(Expression(""), Expression(each))))
    if file.hasbindmounts:
        conditions.append(_Condition(bind_mounts=True))
    hook = _Hook(file.hook, (file.hook, *file.arguments) if file.arguments else ())
    return HookFile(_checked(hook), _stages(file.stages or file.stage), tuple(conditions), True)


def _checked(hook: _Hook) -> Mapping[str, Any]:
    if not hook.path.startswith("/") or "\0" in hook.path:
        raise ValueError(f"hook path {hook.path!r}: expected an absolute path")
    if hook.timeout is not None and hook.timeout <= 0:
        raise ValueError(f"hook timeout {hook.timeout}: expected seconds above 0")
    made: Mapping[str, Any] = msgspec.json.decode(msgspec.json.encode(hook))
    return made


def _stages(stages: Sequence[str]) -> tuple[str, ...]:
    """As runtimes shall run them: what was prestart is createRuntime since runtime-spec 1.0.2, at the same moment."""
    unknown = sorted(set(stages) - set(_STAGES))
    if unknown or not stages:
        raise ValueError(f"stages {', '.join(unknown) or 'are not set'}: expected of {', '.join(_STAGES)}")
    return tuple(dict.fromkeys("createRuntime" if stage == "prestart" else stage for stage in stages))
