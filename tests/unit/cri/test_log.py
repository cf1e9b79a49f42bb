"""What a line of the daemon's log looks like."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri import log


def line(form: type[logging.Formatter], text: str, *arguments: object, **extra: object) -> str:
    record = logging.LogRecord("cri.x", logging.INFO, "x.py", 1, text, arguments, None)
    vars(record).update(log.fields(**extra))
    return form().format(record)


def test_a_text_line_is_pairs_that_are_quoted_where_needed() -> None:
    got = line(log.TextLines, "pulled %s", "nginx", size=12, reason='said "no"\n', empty="")

    assert 'level=info msg="pulled nginx" size=12 reason="said \\"no\\"\\n" empty="" logger=cri.x' in got
    assert "\n" not in got


def test_a_json_line_is_one_object() -> None:
    got = json.loads(line(log.JsonLines, "pulled", size=12, path=Path("/a")))

    assert (got["level"], got["msg"], got["size"], got["path"]) == ("info", "pulled", 12, "/a")


def test_lines_carry_what_is_bound_around_them() -> None:
    with log.bound(pod="p1", container=""), log.bound(container="c1"):
        inside = json.loads(line(log.JsonLines, "x"))
    outside = json.loads(line(log.JsonLines, "x"))

    assert (inside["pod"], inside["container"]) == ("p1", "c1")
    assert "pod" not in outside


def test_an_error_is_told_with_its_kind_and_traceback() -> None:
    try:
        raise ValueError("no such thing")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "failed", (), sys.exc_info())

    got = log.facts(record)

    assert got["error"] == "ValueError: no such thing"
    assert "Traceback" in got["traceback"]


PROGRAM = """
import logging, sys, time
from cri import log
log.configure("info", "text")
started = time.monotonic()
for number in range(30_000):
    logging.getLogger("x").info("line %d " + "x" * 100, number)
took = time.monotonic() - started
assert took < 20, took
logging.getLogger("x").debug("not written")
"""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_a_reader_that_does_not_read_stops_nobody(pipe: tuple[int, int]) -> None:
    reads, writes = pipe

    done = subprocess.run([sys.executable, "-c", PROGRAM], stderr=writes, timeout=60, check=False)

    assert done.returncode == 0
    assert os.read(reads, 100).startswith(b"time=")


def test_what_was_logged_is_written_before_the_end() -> None:
    program = "import logging\nfrom cri import log\nlog.configure('info', 'json')\nlogging.info('last words')"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=True)

    assert json.loads(done.stderr)["msg"] == "last words"
