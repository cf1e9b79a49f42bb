"""What an OCI runtime says when it fails, as one line."""

from oci.monitor.command import complaints


def test_of_json_lines_the_errors_count() -> None:
    log = b"""\
{"level":"warning","msg":"cgroup v1 is old","time":"t"}
{"level":"error","msg":"container_linux.go: no such file","time":"t"}
"""

    assert complaints(log) == "container_linux.go: no such file"


def test_warnings_are_better_than_nothing() -> None:
    assert complaints(b'{"level":"warning","msg":"odd"}\n') == "odd"


def test_plain_lines_are_taken_as_they_are() -> None:
    assert complaints(b"first\nsecond \xff\n") == "first; second \ufffd"
    assert complaints(b"") == ""


def test_only_the_last_few_are_kept() -> None:
    assert complaints(b"\n".join(b"%d" % n for n in range(9))) == "4; 5; 6; 7; 8"
