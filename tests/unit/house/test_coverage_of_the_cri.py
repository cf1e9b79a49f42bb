"""The page that tells which RPCs are there says what the API has and what the code does."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/reference/cri.md"
PROTO = ROOT / "cri/api/runtime/v1/api.proto"
SERVICES = {
    "RuntimeService": ROOT / "cri/runtime_service/service.py",
    "ImageService": ROOT / "cri/image_service/service.py",
}


def declared(service: str) -> set[str]:
    body = re.search(rf"^service {service} \{{(.*?)^\}}", PROTO.read_text(), re.M | re.S)
    assert body
    return set(re.findall(r"^\s*rpc (\w+)\(", body[1], re.M))


def documented(service: str) -> dict[str, bool]:
    part = PAGE.read_text().partition(f"## {service}\n")[2].partition("\n## ")[0]
    return {name: mark == "✓" for name, mark in re.findall(r"^\| (\w+) \| ([✓✗]) \|", part, re.M)}


def answered(service: str) -> dict[str, bool]:
    """The methods of a service's class: whether each does more than to raise Unimplemented."""
    tree = ast.parse(SERVICES[service].read_text())
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == service)
    methods = (node for node in found.body if isinstance(node, ast.AsyncFunctionDef) and node.name[0].isupper())
    return {
        method.name: not any(
            isinstance(step, ast.Raise) and "Unimplemented" in ast.unparse(step) for step in method.body
        )
        for method in methods
    }


@pytest.mark.parametrize("service", SERVICES)
def test_every_rpc_is_documented(service: str) -> None:
    assert set(documented(service)) == declared(service)


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_unimplemented_is_documented_so(service: str) -> None:
    assert documented(service) == answered(service)
