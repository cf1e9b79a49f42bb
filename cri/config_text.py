"""Prints settings: the commented default file, the effective one with origins, JSON, and the reference page."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from typing import Any

from cri.config import SECTIONS, Config, Key, RuntimeHandler, keys
from cri.config_reader import HANDLERS, flag_name

HEAD = """\
Settings of Crito. Every key is shown with its default, commented out: uncomment what you change.
Later files win: this file, then /etc/crito/crito.toml.d/*.toml in lexical order, then flags of `crito serve`.
`crito config` prints what is in effect, and where each value comes from."""

REFERENCE_HEAD = """\
# Configuration

<!-- Made by `make docs` from cri/config.py: change it there. -->

Crito reads `/etc/crito/crito.toml`, then `/etc/crito/crito.toml.d/*.toml` in lexical order (with `--config FILE`: FILE,
then `FILE.d/*.toml` or what `--config-dir` names), then the flags of `crito serve`. Later wins; a list replaces the
list before it as a whole. Each key is also a flag, named by section and key; a list's flag is given once per element.
A wrong key or value stops the start with the file, the key and what was expected. `crito config` prints what is in
effect with the origin of each value, `crito config --default` a commented file.

Durations are seconds as a number, or texts such as `"90s"` and `"4h"`. Sizes are bytes, or texts such as `"16MiB"`.
"""

HANDLER_TABLE = f"runtime.{HANDLERS}.NAME"


def default_toml() -> str:
    """A file that says everything and changes nothing."""
    lines = [*_comment(HEAD), ""]
    for name, doc, table in _tables():
        handler = name == HANDLER_TABLE
        lines += [*_comment(doc), f"# [{name}]" if handler else f"[{name}]", ""]
        for key in table.values():
            lines += _comment(key.doc + (f" Default: {key.shown}." if key.shown else ""))
            lines += [f"# {key.name} = {_default(key)}", ""]
    return "\n".join(lines)


def effective_toml(config: Config) -> str:
    """What is in effect, as TOML; the comment behind each value is its origin."""
    lines = []
    for section, key_values in effective(config).items():
        lines.append(f"[{section}]")
        pairs = [
            (f"{name} = {_toml(value)}", config.origins[f"{section}.{name}"]) for name, value in key_values.items()
        ]
        width = min(60, max(len(text) for text, _ in pairs))
        lines += [f"{text.ljust(width)}  # {origin}" for text, origin in pairs]
        lines.append("")
    return "\n".join(lines)


def effective_json(config: Config) -> str:
    """What is in effect: section → key → {"value", "origin"}."""
    return json.dumps(
        {
            section: {
                name: {"value": value, "origin": config.origins[f"{section}.{name}"]}
                for name, value in key_values.items()
            }
            for section, key_values in effective(config).items()
        },
        indent=2,
    )


def effective(config: Config) -> dict[str, dict[str, Any]]:
    """All values by section and key, as TOML has them."""
    sections = {name: _values(getattr(config, name), keys(section)) for name, section in SECTIONS.items()}
    handlers = {
        f"runtime.{HANDLERS}.{name}": _values(handler, keys(RuntimeHandler))
        for name, handler in config.runtime.handlers.items()
    }
    return sections | handlers


def reference_markdown() -> str:
    """docs/reference/configuration.md."""
    lines = [REFERENCE_HEAD]
    for name, doc, table in _tables():
        lines += [f"## [{name}]", "", doc, "", "| key | default | meaning | expected | flag |", "|---|---|---|---|---|"]
        for key in table.values():
            lines.append("| " + " | ".join(_cell(text) for text in _row(name, key)) + " |")
        lines.append("")
    return "\n".join(lines)


def _row(section: str, key: Key) -> tuple[str, ...]:
    default = key.shown or f"`{_default(key)}`"
    return f"`{key.name}`", default, key.doc, key.kind.expected, f"`{flag(section, key)}`"


def flag(section: str, key: Key) -> str:
    """The flag of a key as the documentation shows it."""
    name = flag_name(f"{section}.{key.name}")
    return f"{name}=VALUE" if section == HANDLER_TABLE else name


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _tables() -> Iterator[tuple[str, str, Mapping[str, Key]]]:
    for name, section in SECTIONS.items():
        yield name, section.__doc__ or "", keys(section)
        if name == "runtime":
            yield HANDLER_TABLE, RuntimeHandler.__doc__ or "", keys(RuntimeHandler)


def _values(section: Any, known: Mapping[str, Key]) -> dict[str, Any]:
    return {name: key.kind.to_toml(getattr(section, name)) for name, key in known.items()}


def _default(key: Key) -> str:
    return '""' if key.default is MISSING else _toml(key.kind.to_toml(key.default))


def _toml(value: Any) -> str:
    """A value of ours in TOML: JSON's texts, numbers, booleans and lists are TOML's too."""
    return json.dumps(value, ensure_ascii=False)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for part in text.splitlines() for line in textwrap.wrap(part, 118)]
