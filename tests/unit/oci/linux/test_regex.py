"""Regular expressions as POSIX has them."""

import pytest

from oci.linux.regex import Expression


@pytest.mark.parametrize(
    ("text", "yes", "no"),
    [
        (r"^com\.example$", "com.example", "com-example"),
        ("/(init|systemd)$", "/sbin/init", "/sbin/initrd"),
        ("^[[:digit:]]{2,3}$", "123", "1"),
        ("", "anything", None),
        (r"\\d", "a\\d", "d"),
        ("^ä$", "ä", "a"),
    ],
)
def test_some_part_of_the_text_has_to_match(text: str, yes: str, no: str | None) -> None:
    assert Expression(text).matches(yes)
    assert no is None or not Expression(text).matches(no)


@pytest.mark.parametrize("text", [r"\d+", "(?i)x", "(", "[a", "a\\", "*{", "a\0b", r"a\\\z"])
def test_what_is_none_is_refused_and_not_misread(text: str) -> None:
    with pytest.raises(ValueError):
        Expression(text)


def test_what_makes_others_try_for_ever_ends() -> None:
    assert not Expression("^(a+)+$").matches("a" * 1000 + "b")
