"""The table of rows names, for every call and every field of the CRI on Linux, tests that there are."""

import ast
import fnmatch
import tomllib
from functools import cache
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor

from cri.api.runtime.v1 import api_pb2 as api

ROOT = Path(__file__).parents[3]
TABLE = tomllib.loads((ROOT / "tests/rows/rows.toml").read_text())
SERVICES = ("RuntimeService", "ImageService")
STREAMED = {  # the messages of what the lists and streams have in common are those of the lists
    "ContainerEventResponse",
    "ListMetricDescriptorsResponse",
    "ListPodSandboxMetricsResponse",
}


def calls() -> set[str]:
    return {method.name for name in SERVICES for method in api.DESCRIPTOR.services_by_name[name].methods}


def fields(kind: str) -> set[str]:
    """Every field of every message that requests, or answers, are made of, as Message.field."""
    found: set[str] = set()
    methods = [method for name in SERVICES for method in api.DESCRIPTOR.services_by_name[name].methods]
    for method in methods:
        _collect(method.input_type if kind == "requests" else method.output_type, found)
    return found


def _collect(message: Descriptor, found: set[str]) -> None:
    if message.name.startswith("Windows"):
        return
    for field in message.fields:
        name = f"{message.name}.{field.name}"
        if name in found or (field.message_type and field.message_type.name.startswith("Windows")):
            continue
        found.add(name)
        if field.message_type and not field.message_type.GetOptions().map_entry:
            _collect(field.message_type, found)


def rows(kind: str) -> list[str]:
    return [*TABLE[kind], *TABLE["not_told_apart"].get(kind, {})]


@cache
def names_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_call_has_its_row() -> None:
    assert set(TABLE["calls"]) == calls()


@pytest.mark.parametrize("kind", ["requests", "answers"])
def test_every_field_has_its_row(kind: str) -> None:
    patterns = rows(kind)

    without = sorted(each for each in fields(kind) if not any(fnmatch.fnmatchcase(each, row) for row in patterns))
    of_nothing = sorted(row for row in patterns if not fnmatch.filter(fields(kind), row))

    assert without == []
    assert of_nothing == []


@pytest.mark.parametrize("kind", ["calls", "requests", "answers"])
def test_every_row_names_tests_that_there_are(kind: str) -> None:
    wrong = []
    for row, tests in TABLE[kind].items():
        for test in tests:
            path, _, name = test.partition("::")
            if not (ROOT / path).is_file() or name.partition("[")[0] not in names_in(path):
                wrong.append(f"{row}: {test}")
        if not tests:
            wrong.append(f"{row}: no tests")

    assert wrong == []
