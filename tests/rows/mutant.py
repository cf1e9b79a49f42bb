"""A daemon, and a run of tests, that lack one call or one field of the CRI at a time.

The file that CRITO_TEST_MUTATION names says what, at this moment: `calls:Version`, `requests:Message.field` (not seen
wherever a request has it) or `answers:Message.field` (never filled in); without the file all is as it should be. The
daemon is run with `install`; the tests with this module as a plugin of pytest, which makes and takes away the file, and
does the same to the pure translations that unit tests call.
"""

import copy
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import grpc
import pytest
from _pytest.runner import runtestprotocol
from google.protobuf.message import Message

MUTATION = Path(os.environ.get("CRITO_TEST_MUTATION", "/nonexistent"))
HANDLERS = ("unary_unary_rpc_method_handler", "unary_stream_rpc_method_handler")


def current(kind: str) -> str:
    """What of this kind is lacking now; "" for nothing."""
    try:
        found, _, what = MUTATION.read_text().partition(":")
    except OSError:
        return ""
    return what if found == kind else ""


def without(message: Any, what: str) -> Any:
    """The message itself, with the field cleared in it and in every message within."""
    if not what or not isinstance(message, Message):
        return message
    name, _, lacking = what.partition(".")
    for field, value in message.ListFields():
        if message.DESCRIPTOR.name == name and lacking in (field.name, "*"):
            message.ClearField(field.name)
        elif (kind := field.message_type) and not kind.GetOptions().map_entry:
            for each in value if field.is_repeated else [value]:
                without(each, what)
    return message


# The daemon


def install() -> None:
    for name in HANDLERS:
        setattr(grpc, name, _lacking(getattr(grpc, name)))


def _lacking(original: Callable[..., Any]) -> Callable[..., Any]:
    def handler(behaviour: Any, request_deserializer: Any = None, response_serializer: Any = None) -> Any:
        def take(data: bytes) -> Any:
            if current("calls") == behaviour.__name__:
                raise NotImplementedError(f"{behaviour.__name__}: left out, to see whether a test notices")
            return without(request_deserializer(data), current("requests"))

        def give(message: Message) -> Any:
            return response_serializer(without(message, current("answers")))

        return original(
            behaviour,
            request_deserializer=take if request_deserializer else None,  # the inner one of a wrapped handler has none
            response_serializer=give if response_serializer else None,
        )

    return handler


# The tests

_plan: dict[str, list[str]] = {}
_outcomes: dict[str, str] = {}


def pytest_configure() -> None:
    from cri.image_service import service  # noqa: PLC0415
    from cri.runtime_service import from_cri, stats, status, to_cri  # noqa: PLC0415

    _plan.update(json.loads(Path(os.environ["CRITO_TEST_PLAN"]).read_text()))
    inwards: dict[Any, tuple[str, ...]] = {
        from_cri: ("sandbox_spec", "container_spec", "resources"),
        service: ("_credentials",),
    }
    outwards: dict[Any, tuple[str, ...]] = {
        to_cri: ("sandbox", "sandbox_status", "container", "container_status", "resources"),
        stats: ("memory_usage", "swap_usage", "io_usage", "process_usage", "network_usage"),
        stats.Stats: ("_container", "_sandbox"),
        status.RuntimeStatus: ("response",),
    }
    for lacking, translations in ((_before, inwards), (_after, outwards)):
        for module, names in translations.items():
            for name in names:
                setattr(module, name, lacking(getattr(module, name)))


def _before(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def lacking(message: Message, *arguments: Any) -> Any:
        seen = type(message)()
        seen.CopyFrom(message)
        return function(without(seen, current("requests")), *arguments)

    return lacking


def _after(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def lacking(*arguments: Any, **named: Any) -> Any:
        return without(function(*arguments, **named), current("answers"))

    return lacking


def pytest_runtest_protocol(item: pytest.Function, nextitem: pytest.Item | None) -> bool:
    """Each test as it is, then once without each of what it is said to hold."""
    rows = [row for row, tests in _plan.items() if {item.nodeid, item.nodeid.partition("[")[0]} & set(tests)]
    untouched = _result(item, "")
    if untouched == "skipped":
        _outcomes.update({row: untouched for row in rows if _outcomes.get(row) != "failed"})
    for row in rows if untouched == "passed" else []:
        if _outcomes.get(row) == "failed":
            continue
        _outcomes[row] = _result(item, row)
        print(f"\n{_outcomes[row]:8} {row} by {item.nodeid}", flush=True)
    for report in runtestprotocol(item, log=False, nextitem=nextitem):
        del report
    return True


def _result(item: pytest.Function, row: str) -> str:
    item.user_properties = [("row", row)]
    item._initrequest()  # a test can be set up once; this makes it new (as plugins that repeat tests do it)
    reports = runtestprotocol(item, log=False, nextitem=copy.copy(item))
    found = {report.outcome for report in reports if report.when != "teardown"}
    return "failed" if "failed" in found else "skipped" if "skipped" in found else "passed"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Iterator[None]:
    """Only the test itself lacks it: what it has made can be taken away."""
    row = dict(item.user_properties).get("row", "")
    if row:
        MUTATION.write_text(str(row))
    try:
        return (yield)
    finally:
        MUTATION.unlink(missing_ok=True)


def _verdicts() -> dict[str, str]:
    words = {"failed": "held", "passed": "SURVIVED", "skipped": "skipped here"}
    return {row: words.get(_outcomes.get(row, ""), "NOT RUN") for row in _plan}


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.exitstatus = 0 if {*_verdicts().values()} <= {"held", "skipped here"} else 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    verdicts = _verdicts()
    for row, verdict in verdicts.items():
        terminalreporter.write_line(f"{verdict}: {row}")
    counts = Counter(verdicts.values())
    terminalreporter.write_line(", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items())))
