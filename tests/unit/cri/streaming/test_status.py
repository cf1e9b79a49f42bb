"""What clients read from the error stream, and what they write to the resize stream."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.streaming import status
from cri.streaming.remotecommand import _sizes


def test_success_is_a_status_from_v4_on_and_silence_before() -> None:
    assert json.loads(status.success(is_json=True))["status"] == "Success"
    assert status.success(is_json=False) == b""


def test_an_exit_code_is_told_as_clients_look_for_it() -> None:
    told = json.loads(status.exit_code(42, is_json=True))

    assert (told["status"], told["reason"]) == ("Failure", "NonZeroExitCode")
    assert told["details"]["causes"] == [{"reason": "ExitCode", "message": "42"}]
    assert status.exit_code(42, is_json=False) == b"command terminated with non-zero exit code: 42"


def test_what_could_not_be_started_is_told_with_its_reason() -> None:
    told = json.loads(status.failure("no such file: 'x'", is_json=True))

    assert (told["status"], told["reason"], told["code"]) == ("Failure", "InternalError", 500)
    assert "no such file: 'x'" in told["message"]
    assert status.failure("no such file", is_json=False) == b"no such file"


@pytest.mark.parametrize(
    ("text", "sizes", "rest"),
    [
        ('{"Width":80,"Height":24}\n', [(24, 80)], ""),
        ('{"Width":80,"Height":24}\n{"Width":100,"Height":30}', [(24, 80), (30, 100)], ""),
        ('{"Width":80,"Hei', [], '{"Width":80,"Hei'),
        ('{"Width":80,"Height":24} {"Wid', [(24, 80)], '{"Wid'),
        ('{"Width":-5,"Height":700000}', [(65535, 0)], ""),
        ('{"Width":"80","Height":24}', [], ""),
        ("[1, 2] 3", [], ""),
    ],
)
def test_sizes_are_read_from_a_stream_of_objects(text: str, sizes: list[tuple[int, int]], rest: str) -> None:
    assert _sizes(text) == (sizes, rest)


@given(st.text(max_size=200))
def test_any_text_is_sizes_or_a_rest(text: str) -> None:
    sizes, rest = _sizes(text)

    assert all(0 <= rows <= 65535 and 0 <= columns <= 65535 for rows, columns in sizes)
    assert text.endswith(rest)
