"""A setting that nothing reads is a promise that nobody keeps."""

import ast
from pathlib import Path

from cri.config import SECTIONS, RuntimeHandler, keys

ROOT = Path(__file__).parents[3]
# docs/reference/cri.md says so: there is no streaming server in this version.
WITHOUT_EFFECT = {f"streaming.{name}" for name in keys(SECTIONS["streaming"])}


def attributes_read() -> set[str]:
    """The names of all attributes read in cri/, but for the modules that read and print settings as such."""
    files = [path for path in (ROOT / "cri").rglob("*.py") if not path.name.startswith(("config", "api_pb2"))]
    trees = (ast.walk(ast.parse(path.read_text())) for path in files)
    return {node.attr for nodes in trees for node in nodes if isinstance(node, ast.Attribute)}


def test_every_setting_is_read_by_somebody() -> None:
    sections = {**SECTIONS, "runtime.handlers.NAME": RuntimeHandler}
    declared = {f"{section}.{name}" for section, kind in sections.items() for name in keys(kind)}
    read = attributes_read()

    unread = {dotted for dotted in declared if dotted.rpartition(".")[2] not in read}

    assert unread - WITHOUT_EFFECT == set()
