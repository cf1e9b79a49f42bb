"""Hooks by files: which containers they are for, in which order, and what a wrong file does."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci.errors import FailedPrecondition
from oci.hook_files import HookFiles, parse

TRUE = "/bin/true"


def _objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = ["version", "hook", "path", "when", "stages", "always", "commands", "annotations", "cmds"]
    return st.dictionaries(st.sampled_from(names) | st.text(), values)


def write(directory: Path, name: str, **fields: Any) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / name
    file = {"version": "1.0.0", "hook": {"path": TRUE}, "when": {"always": True}, "stages": ["createRuntime"]}
    path.write_text(json.dumps({**file, **fields}))
    return path


def injected(
    *directories: Path, annotations: dict[str, str] | None = None, mounts: bool = False, command: str = "/bin/sh"
) -> Any:
    config = {"process": {"args": [command, "-c"]}}
    return HookFiles(directories).inject(config, annotations or {}, mounts).get("hooks")


def test_a_hook_is_put_into_its_stages_as_it_is_written(tmp_path: Path) -> None:
    hook = {"path": TRUE, "args": ["true", "x"], "env": ["A=1"], "timeout": 5}
    write(tmp_path, "a.json", hook=hook, stages=["poststop", "createContainer", "poststop"])

    assert injected(tmp_path) == {"poststop": [hook], "createContainer": [hook]}


def test_prestart_is_what_it_is_called_today(tmp_path: Path) -> None:
    write(tmp_path, "a.json", stages=["prestart", "createRuntime"])

    assert injected(tmp_path) == {"createRuntime": [{"path": TRUE}]}


@pytest.mark.parametrize(
    ("when", "asked", "expected"),
    [
        ({"always": True}, {}, True),
        ({"always": False}, {}, False),
        ({}, {}, False),
        ({"hasBindMounts": True}, {"mounts": True}, True),
        ({"hasBindMounts": True}, {}, False),
        ({"hasBindMounts": False}, {}, False),
        ({"commands": ["/init$", "^/bin/s.$"]}, {}, True),
        ({"commands": ["^sh$"]}, {}, False),
        ({"annotations": {"^a$": "^1"}}, {"annotations": {"a": "12"}}, True),
        ({"annotations": {"^a$": "^1"}}, {"annotations": {"a": "21", "ab": "1"}}, False),
        ({"annotations": {"a": "", "b": ""}}, {"annotations": {"a": "1"}}, False),
        ({"annotations": {"a": "", "b": ""}}, {"annotations": {"a": "1", "b": "2"}}, True),
        ({"always": True, "commands": ["nope"]}, {}, False),
        ({"always": None, "commands": ["sh"], "hasBindMounts": True}, {"mounts": True}, True),
    ],
)
def test_a_hook_is_for_containers_that_meet_all_its_conditions(
    tmp_path: Path, when: dict[str, Any], asked: dict[str, Any], expected: bool
) -> None:
    write(tmp_path, "a.json", when=when)

    assert bool(injected(tmp_path, **asked)) is expected


@pytest.mark.parametrize(
    ("fields", "asked", "expected"),
    [
        ({"cmds": ["/sh$"]}, {}, True),
        ({"cmd": ["/bash$"]}, {}, False),
        ({"annotations": ["dynamics"]}, {"annotations": {"x": "fluid-dynamics"}}, True),
        ({"annotation": ["x"], "hasbindmounts": True}, {"mounts": True}, True),
        ({"hasbindmounts": True}, {}, False),
        ({}, {}, False),
    ],
)
def test_of_the_old_schema_one_condition_is_enough(
    tmp_path: Path, fields: dict[str, Any], asked: dict[str, Any], expected: bool
) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"hook": TRUE, "arguments": ["x"], "stage": ["poststop"], **fields}))

    assert injected(tmp_path, **asked) == ({"poststop": [{"path": TRUE, "args": [TRUE, "x"]}]} if expected else None)


def test_hooks_come_in_the_order_of_their_files_names_and_later_directories_mask(tmp_path: Path) -> None:
    first, second = tmp_path / "usr", tmp_path / "etc"
    for directory, name, env in (
        (first, "02-b.json", "B"),
        (first, "01-A.json", "masked"),
        (second, "01-A.json", "A"),
        (second, "01-UPPER.json", "U"),
        (first, "01-lower.json", "L"),
        (first, "00-not.txt", "never"),
    ):
        write(directory, name, hook={"path": TRUE, "env": [f"N={env}"]})

    hooks = injected(first, second, tmp_path / "missing")["createRuntime"]

    assert [hook["env"] for hook in hooks] == [["N=A"], ["N=L"], ["N=U"], ["N=B"]]


def test_a_masked_file_may_be_wrong(tmp_path: Path) -> None:
    write(tmp_path / "usr", "a.json").write_text("{")
    write(tmp_path / "etc", "a.json")

    assert injected(tmp_path / "usr", tmp_path / "etc")


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    hooks, config = HookFiles([tmp_path]), {"process": {"args": ["x"]}}
    path = write(tmp_path, "a.json")
    assert "hooks" in hooks.inject(config, {}, False)

    path.unlink()

    assert hooks.inject(config, {}, False) == config == {"process": {"args": ["x"]}}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"version": "2.0.0"}, "version '2.0.0'"),
        ({"stages": ["later"]}, "later"),
        ({"stages": []}, "stages"),
        ({"stages": None}, "stages"),
        ({"hook": {}}, "path"),
        ({"hook": {"path": "true"}}, "absolute"),
        ({"hook": {"path": TRUE, "timeout": 0}}, "timeout"),
        ({"when": {"commands": "sh"}}, "commands"),
        ({"when": {"commands": [r"\d"]}}, "extended regular"),
        ({"when": {"annotations": {"(": ""}}}, "Unmatched"),
        ({"when": {"annotations": ["a"]}}, "annotations"),
        ({"when": None}, "when"),
        ({"version": "0.1.0", "hook": TRUE, "stage": ["poststop"], "stages": ["poststop"]}, "one of them"),
    ],
)
def test_a_wrong_file_refuses_containers_and_tells_why(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    path = write(tmp_path, "a.json", **fields)

    with pytest.raises(FailedPrecondition, match=rf"a\.json: .*{why}"):
        injected(tmp_path)
    assert list(HookFiles([tmp_path]).unusable()) == [path]


def test_a_hook_whose_program_is_missing_refuses_those_that_it_is_for(tmp_path: Path) -> None:
    write(tmp_path, "a.json", hook={"path": "/no/such/hook"}, when={"commands": ["^/bin/sh$"]})

    with pytest.raises(FailedPrecondition, match=r"a\.json: /no/such/hook"):
        injected(tmp_path)
    assert injected(tmp_path, command="/other") is None


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("nowhere")
    (tmp_path / "directory.json").mkdir()
    (tmp_path / "deep.json").write_text("[" * 100_000)

    found = HookFiles([tmp_path, tmp_path / "pipe.json"]).unusable()

    assert sorted(path.name for path in found) == ["deep.json", "directory.json", "link.json", "pipe.json"]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | _objects(c)))
def test_no_document_does_more_than_be_refused(document: Any) -> None:
    parse(json.dumps(document).encode())
