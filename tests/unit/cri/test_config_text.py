"""What is printed of the settings says the truth and can be read back."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

from cri.config import SECTIONS, keys
from cri.config_reader import Host, load
from cri.config_text import default_toml, effective_json, effective_toml, reference_markdown

ROOT = Path(__file__).parents[3]
BARE = Host(has_systemd=False, find_executable=lambda _name, _dirs: None)
RICH = Host(has_systemd=True, find_executable=lambda name, _dirs: Path("/usr/bin") / name)


def test_the_default_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "crito.toml"
    file.write_text(default_toml())

    loaded = load(file, host=RICH)

    assert replace(loaded, origins={}) == replace(load(host=RICH), origins={})
    assert str(file) not in loaded.origins.values()


def test_uncommented_the_default_file_says_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "crito.toml"
    keys_only = re.sub(r"^# (\w+ = .*)$", r"\1", default_toml(), flags=re.M)
    without_handlers = re.sub(r"# \[runtime.handlers.NAME\].*?(?=\[image\])", "", keys_only, flags=re.S)
    file.write_text(without_handlers)

    assert replace(load(file, host=BARE), origins={}) == replace(load(host=BARE), origins={})


def test_the_effective_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = load(host=RICH, flags={"image.pinned_images": ['a "quoted" \\ one', "é*"], "log.level": "debug"})
    file = tmp_path / "crito.toml"
    file.write_text(effective_toml(config))

    assert replace(load(file, host=BARE), origins={}) == replace(config, origins={})


def test_each_effective_value_bears_its_origin() -> None:
    text = effective_toml(load(host=BARE, flags={"log.level": "debug"}))

    assert re.search(r'^level = "debug" +# --log-level$', text, re.M)
    assert re.search(r'^format = "text" +# default$', text, re.M)


def test_the_json_has_every_key_with_value_and_origin() -> None:
    document = json.loads(effective_json(load(host=RICH)))

    assert document["runtime"]["cgroup_driver"] == {"value": "systemd", "origin": "host: /run/systemd/system exists"}
    assert document["runtime.handlers.crun"]["path"]["value"] == "/usr/bin/crun"
    assert {name for name in document if "." not in name} == set(SECTIONS)


def test_every_key_is_documented_in_a_sentence() -> None:
    for section in SECTIONS.values():
        for key in keys(section).values():
            assert key.doc.endswith("."), key.name


def test_the_default_file_is_valid_toml() -> None:
    assert set(tomllib.loads(default_toml())) == set(SECTIONS)


def test_the_documentation_of_the_settings_is_current() -> None:
    assert (ROOT / "docs/reference/configuration.md").read_text() == reference_markdown(), "run `make docs`"
    assert (ROOT / "deploy/config/crito.toml").read_text() == default_toml(), "run `make docs`"
