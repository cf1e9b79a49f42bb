"""JSON of which nothing may surprise: no key twice, no field unknown, none missing, each of its type.

For documents that decide what may run, where two readers must not see two things.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any, NoReturn, TypeVar

from oci.errors import Error

T = TypeVar("T")


def parse(text: str | bytes, subject: str) -> Any:
    """The value that `text` spells. Raises Error naming `subject` where it is no JSON or has a key twice."""
    try:
        decoded = text if isinstance(text, str) else text.decode()  # UTF-8 alone, without a byte order mark
        return json.loads(decoded, object_pairs_hook=_without_duplicates, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Error(f"{subject} is not JSON as it must be: {error}") from error


class Object:
    """A JSON object with the fields it may have, for errors that name the field and where it stands."""

    def __init__(
        self, value: object, subject: str, required: Collection[str] = (), optional: Collection[str] | None = ()
    ) -> None:
        """`optional` None: any other fields may be there. Raises Error for what is no such object."""
        if not isinstance(value, dict):
            raise Error(f"{subject} must be an object")
        missing = [name for name in required if name not in value]
        if missing:
            raise Error(f"{subject} lacks {', '.join(missing)}")
        unknown = [] if optional is None else sorted(set(value) - set(required) - set(optional))
        if unknown:
            raise Error(f"{subject} has the unknown key {', '.join(map(repr, unknown))}")
        self._values: Mapping[str, Any] = value
        self.subject = subject

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def raw(self, name: str) -> Any:
        return self._values.get(name)

    def text(self, name: str) -> str:
        return self._typed(name, str, "a text")

    def integer(self, name: str) -> int:
        if isinstance(self._values.get(name), bool):
            raise Error(f"{self.subject}: {name} must be an integer")
        return self._typed(name, int, "an integer")

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, not empty."""
        found = self._typed(name, list, "a list of texts")
        if not found or not all(isinstance(each, str) for each in found):
            raise Error(f"{self.subject}: {name} must be a list of texts, not empty")
        return tuple(found)

    def _typed(self, name: str, kind: type[T], meaning: str) -> T:
        found = self._values.get(name)
        if not isinstance(found, kind):
            raise Error(f"{self.subject}: {name} must be {meaning}")
        return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"a key is there twice among {', '.join(map(repr, keys))}")
    return dict(pairs)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
