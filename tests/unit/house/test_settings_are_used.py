"""A setting that nothing reads is a promise that nobody keeps."""

import ast
from pathlib import Path
from typing import Any

from cri.config import SECTIONS, RuntimeHandler, keys

ROOT = Path(__file__).parents[3]
WITHOUT_EFFECT = "Without effect in this version."  # in the description of a section that waits for its reader


def attributes_read() -> set[str]:
    """The names of all attributes read in cri/, but for the modules that read and print settings as such."""
    files = [path for path in (ROOT / "cri").rglob("*.py") if not path.name.startswith(("config", "api_pb2"))]
    trees = (ast.walk(ast.parse(path.read_text())) for path in files)
    return {node.attr for nodes in trees for node in nodes if isinstance(node, ast.Attribute)}


def unread(section: type[Any]) -> set[str]:
    return set(keys(section)) - attributes_read()


def waits(section: type[Any]) -> bool:
    return WITHOUT_EFFECT in (section.__doc__ or "")


def test_every_setting_is_read_by_somebody() -> None:
    sections = {**SECTIONS, "runtime.handlers.NAME": RuntimeHandler}

    found = {name: unread(section) for name, section in sections.items() if not waits(section)}

    assert {name: missing for name, missing in found.items() if missing} == {}


def test_a_section_said_to_have_no_effect_has_none() -> None:
    wrong = [name for name, section in SECTIONS.items() if waits(section) and not unread(section)]

    assert wrong == []
