"""Imports point one way: cri → sandbox → oci; and what must stay light stays light."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FORBIDDEN = {"oci": {"sandbox", "cri"}, "sandbox": {"cri"}, "cri": set[str]()}
PROTOBUF = {"google", "grpc", "cri.api"}
# Where messages are allowed: the server, the services with their translations, and the clients of the command line.
EDGE = (
    "cri/api/",
    "cri/server.py",
    "cri/daemon.py",
    "cri/chunks.py",
    "cri/errors.py",
    "cri/node_",
    "cri/nri/",
    "cri/cli_",
    "cri/runtime_service/",
    "cri/image_service/service.py",
    "cri/image_service/from_cri.py",
    "cri/image_service/to_cri.py",
)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all that a file imports, relative imports resolved, wherever in the file."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, each.name) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{each.name}") for each in node.names)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def is_in(name: str, packages: set[str]) -> bool:
    return any(name == each or name.startswith(each + ".") for each in packages)


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_point_one_way(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(package)
        for line, name in imports(path)
        if is_in(name, FORBIDDEN[package] | {"tests", "critest", "bench"})
    ]

    assert wrong == []


def test_the_monitor_imports_the_standard_library_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"oci.monitor"}

    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources("oci/monitor")
        for line, name in imports(path)
        if not is_in(name, allowed)
    ]

    assert wrong == []


def test_no_protobuf_message_goes_below_the_edge() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for package in FORBIDDEN
        for path in sources(package)
        if not str(path.relative_to(ROOT)).startswith(EDGE)
        for line, name in imports(path)
        if is_in(name, PROTOBUF)
    ]

    assert wrong == []


def test_nothing_forks_or_prepares_children_in_the_daemon() -> None:
    forbidden = {"os.fork", "os.forkpty", "multiprocessing", "os.posix_spawn"}

    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for package in FORBIDDEN
        for path in sources(package)
        if not path.is_relative_to(ROOT / "oci/monitor")
        for name in called_or_imported(path)
        if is_in(name, forbidden) or name == "preexec_fn"
    ]

    assert wrong == []


def called_or_imported(path: Path) -> Iterator[str]:
    yield from (name for _, name in imports(path))
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
            yield from (each.arg for each in node.keywords if each.arg)


def test_every_module_says_what_it_owns() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for package in FORBIDDEN
        for path in sources(package)
        if "cri/api/" not in str(path) and path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))
    ]

    assert silent == []
