import pytest

from oci.monitor.wait import exit_status


@pytest.mark.parametrize(
    ("output", "code"),
    [
        ('{"id":"c1","exitStatus":7}\n', 7),
        ('{"id":"c1","exitStatus":143}', 143),
        ("", None),
        ("waiting on container: connection refused", None),
        ('{"id":"c1"}', None),
        ("[]", None),
        ('{"exitStatus":null}', None),
    ],
)
def test_an_exit_status_is_what_the_runtime_prints_or_none(output: str, code: int | None) -> None:
    assert exit_status(output) == code
