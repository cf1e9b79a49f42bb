"""What the command says, as its users run it."""

import json
import subprocess
import sys
from pathlib import Path

from cri.cli_images import bar_line, size
from cri.node_messages import Progress
from oci.version import VERSION


def crito(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cri", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_version_is_told_in_words_and_in_json() -> None:
    assert crito("version").stdout == f"crito {VERSION}\n"
    assert json.loads(crito("version", "--json").stdout)["version"] == VERSION


def test_the_version_needs_no_grpc() -> None:
    program = "import sys; from cri.cli import main; main(['version']); print(sorted(sys.modules))"

    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert "'grpc'" not in modules
    assert "'google.protobuf'" not in modules
    assert "'asyncio'" not in modules


def test_the_effective_configuration_is_printed_with_origins(tmp_path: Path) -> None:
    file = tmp_path / "crito.toml"
    file.write_text("[log]\nlevel = 'debug'\n")

    done = crito("config", "--config", str(file), "--json", "--runtime-drop-pause", "--runtime-handler", "x.path=/x")

    printed = json.loads(done.stdout)
    assert printed["log"]["level"] == {"value": "debug", "origin": str(file)}
    assert printed["runtime"]["drop_pause"] == {"value": True, "origin": "--runtime-drop-pause"}
    assert printed["runtime.handlers.x"]["path"] == {"value": "/x", "origin": "--runtime-handler x.path"}


def test_a_wrong_setting_stops_the_daemon_with_one_line(tmp_path: Path) -> None:
    file = tmp_path / "crito.toml"
    file.write_text("[log]\nlevel = 'loud'\n")

    done = crito("serve", "--config", str(file))

    assert done.returncode == 2
    assert done.stderr == (f'crito: {file}: log.level = "loud": expected one of "debug", "info", "warning", "error"\n')


def test_a_flag_of_a_handler_names_handler_and_key() -> None:
    done = crito("config", "--runtime-handler", "crun")

    assert done.returncode == 2
    assert "expected NAME.KEY=VALUE" in done.stderr


def test_without_a_daemon_the_socket_is_named(tmp_path: Path) -> None:
    for command in (("status",), ("images", "list"), ("images", "pull", "a"), ("images", "load", "/a")):
        done = crito(*command, "--socket", str(tmp_path / "crito.sock"))

        assert done.returncode == 1
        assert done.stderr == (
            f"crito: cannot reach the daemon on {tmp_path}/crito.sock: there is no such socket; "
            "is `crito serve` running?\n"
        )


def test_every_command_explains_itself() -> None:
    for command in (["serve"], ["config"], ["check"], ["status"], ["version"], ["images", "pull"]):
        done = crito(*command, "--help")

        assert done.returncode == 0
        assert "usage: crito" in done.stdout


def test_the_bar_tells_share_amount_and_speed() -> None:
    progress = Progress("fetching", 1, 2, 15_000_000, 20_000_000, 30_000_000)

    line = bar_line(progress, 80, seconds=3)

    assert line.startswith(" 75% [####")
    assert line.endswith("] 15 MB of 20 MB, 5 MB/s, 1/2 layers")
    assert len(line) <= 80
    assert len(bar_line(progress, 20, seconds=3)) <= 20
    assert bar_line(Progress("resolving", 0, 0, 0, 0, 0), 60, seconds=0).startswith("  0% [....")


def test_sizes_are_told_in_three_digits() -> None:
    assert [size(count) for count in (0, 999, 1000, 1_234_567, 5 * 10**12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.23 MB",
        "5 TB",
    ]
