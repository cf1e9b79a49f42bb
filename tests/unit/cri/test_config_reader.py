"""What files, drop-ins and flags make of the settings, and what is said of wrong ones."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from cri.config import CgroupDriver, LogLevel
from cri.config_kinds import Ulimit
from cri.config_reader import ConfigError, Host, find_executable, load

BARE = Host(has_systemd=False, find_executable=lambda _name, _dirs: None)


def host_with(*names: str) -> Host:
    def find(name: str, _directories: Iterable[Path]) -> Path | None:
        return Path("/usr/bin") / name if name in names else None

    return replace(BARE, find_executable=find)


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "crito.toml"
    file.write_text(text)
    return file


def test_without_a_file_everything_is_as_documented() -> None:
    config = load(host=BARE)

    assert config.crito.root == Path("/var/lib/crito")
    assert config.crito.run_dir == Path("/run/crito")
    assert config.api.listen == Path("/run/crito/crito.sock")
    assert config.runtime.cgroup_driver is CgroupDriver.CGROUPFS
    assert config.runtime.handlers == {}
    assert set(config.origins.values()) == {"default", "host: none found"}


def test_a_file_wins_over_defaults_and_is_named_as_the_origin(tmp_path: Path) -> None:
    file = written(tmp_path, '[log]\nlevel = "debug"\n')

    config = load(file, host=BARE)

    assert config.log.level is LogLevel.DEBUG
    assert config.origins["log.level"] == str(file)
    assert config.origins["log.format"] == "default"


def test_drop_ins_win_over_the_file_in_lexical_order(tmp_path: Path) -> None:
    file = written(tmp_path, '[network]\ndefault_network = "a"\nplugin_dirs = ["/a"]\n')
    drop_ins = tmp_path / "crito.toml.d"
    drop_ins.mkdir()
    (drop_ins / "20-x.toml").write_text('[network]\ndefault_network = "c"\n')
    (drop_ins / "10-x.toml").write_text('[network]\ndefault_network = "b"\nplugin_dirs = ["/b", "/c"]\n')
    (drop_ins / "30-x.conf").write_text("this is not read")

    config = load(file, host=BARE)

    assert config.network.default_network == "c"
    assert config.network.plugin_dirs == (Path("/b"), Path("/c"))
    assert config.origins["network.plugin_dirs"] == str(drop_ins / "10-x.toml")


def test_flags_win_over_drop_ins(tmp_path: Path) -> None:
    file = written(tmp_path, "[runtime]\ndrop_pause = false\n")

    config = load(file, host=BARE, flags={"runtime.drop_pause": ["true"], "image.pinned_images": ["a", "b*"]})

    assert config.runtime.drop_pause is True
    assert config.image.pinned_images == ("a", "b*")
    assert config.origins["runtime.drop_pause"] == "--runtime-drop-pause"


def test_an_empty_flag_empties_a_list() -> None:
    assert load(host=BARE, flags={"runtime.default_capabilities": [""]}).runtime.default_capabilities == ()


def test_the_socket_follows_the_run_dir_unless_it_is_set(tmp_path: Path) -> None:
    assert load(host=BARE, flags={"crito.run_dir": "/run/two"}).api.listen == Path("/run/two/crito.sock")

    both = {"crito.run_dir": "/run/two", "api.listen": "/run/three.sock"}
    assert load(host=BARE, flags=both).api.listen == Path("/run/three.sock")


def test_systemd_makes_cgroups_where_it_runs() -> None:
    config = load(host=replace(BARE, has_systemd=True))

    assert config.runtime.cgroup_driver is CgroupDriver.SYSTEMD
    assert config.origins["runtime.cgroup_driver"].startswith("host:")


def test_a_set_cgroup_driver_wins_over_what_the_host_has() -> None:
    config = load(host=replace(BARE, has_systemd=True), flags={"runtime.cgroup_driver": "cgroupfs"})

    assert config.runtime.cgroup_driver is CgroupDriver.CGROUPFS


def test_runtimes_of_the_host_become_handlers() -> None:
    config = load(host=host_with("crun", "runc"), flags={"crito.run_dir": "/run/two"})

    assert {name: each.path for name, each in config.runtime.handlers.items()} == {
        "crun": Path("/usr/bin/crun"),
        "runc": Path("/usr/bin/runc"),
    }
    assert config.runtime.handlers["runc"].root == Path("/run/two/runtimes/runc")


def test_a_handler_needs_no_more_than_a_name_that_is_an_executable(tmp_path: Path) -> None:
    file = written(tmp_path, "[runtime.handlers.youki]\n")

    assert load(file, host=host_with("youki")).runtime.handlers["youki"].path == Path("/usr/bin/youki")


def test_keys_of_one_handler_are_merged_from_all_places(tmp_path: Path) -> None:
    file = written(tmp_path, '[runtime.handlers.x]\npath = "/opt/x"\nmonitor_cgroup = "/a"\n')

    flags: dict[str, str | list[str]] = {"runtime.handlers.x.monitor_cgroup": ["/b"]}
    handler = load(file, host=BARE, flags=flags).runtime.handlers["x"]

    assert (handler.path, handler.monitor_cgroup) == (Path("/opt/x"), "/b")


def test_a_handler_without_a_path_that_is_nowhere_stops(tmp_path: Path) -> None:
    file = written(tmp_path, "[runtime.handlers.kata]\nmonitor_cgroup = '/m'\n")

    with pytest.raises(ConfigError, match=r"crito.toml: runtime.handlers.kata.path: not set.*expected the path"):
        load(file, host=BARE)


def test_units_and_pairs_are_read(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """
        [streaming]
        idle_timeout = "1h30m"
        [api]
        grpc_max_recv_msg_size = "16MiB"
        [runtime]
        container_create_timeout = 12.5
        default_ulimits = ["nofile=1:2", "memlock=-1:-1"]
        default_sysctls = ["net.ipv4.ping_group_range=0 0"]
        default_env = ["A=b=c", "EMPTY="]
        default_capabilities = ["cap_net_raw", "KILL"]
        pause_path = ""
        """,
    )

    config = load(file, host=host_with("catatonit"))

    assert config.streaming.idle_timeout == 5400
    assert config.api.grpc_max_recv_msg_size == 16 << 20
    assert config.runtime.container_create_timeout == 12.5
    assert config.runtime.default_ulimits == (Ulimit("nofile", 1, 2), Ulimit("memlock", -1, -1))
    assert config.runtime.default_sysctls == (("net.ipv4.ping_group_range", "0 0"),)
    assert config.runtime.default_env == (("A", "b=c"), ("EMPTY", ""))
    assert config.runtime.default_capabilities == ("NET_RAW", "KILL")
    assert config.runtime.pause_path is None


WRONG = [
    ("[crito]\nroot = 'here'", 'crito.root = "here": expected an absolute path'),
    ("[crito]\nroot = '/a/../b'", "expected an absolute path"),
    ("[crito]\nroot = 3", "crito.root = 3: expected an absolute path"),
    ("[crito]\nrot = '/a'", 'crito.rot: unknown key: did you mean "root"'),
    ("[cryto]\nroot = '/a'", r'\[cryto\]: unknown section: did you mean "crito"'),
    ("[zzz]", "unknown section: expected one of crito, api"),
    ("crito = 1", "crito = 1: expected a table"),
    ("[crito", "not valid TOML"),
    ("[crito]\nroot = '/a'\nrun_dir = '/a'", "expected another directory"),
    ("[api]\nlisten = '/" + "x" * 120 + "'", "at most 107 bytes"),
    ("[api]\ngrpc_max_recv_msg_size = 5", "expected a size from 1MiB"),
    ("[streaming]\nport = 65536", "streaming.port = 65536: expected a port"),
    ("[streaming]\nport = true", "streaming.port = true: expected a port"),
    ("[streaming]\nport = '80'", 'streaming.port = "80": expected a port'),
    ("[streaming]\naddress = 'localhost'", "expected an IP address"),
    ("[streaming]\nidle_timeout = '4 hours'", "expected seconds as a number, or a text"),
    ("[streaming]\nidle_timeout = -1", "expected seconds"),
    ("[streaming]\ntls_cert = '/a'", "tls_cert is set and streaming.tls_key is not: expected both"),
    ("[streaming]\ntls_ca = '/a'", "expected a certificate too"),
    ("[runtime]\ncgroup_driver = 'v2'", 'expected one of "systemd", "cgroupfs"'),
    ("[runtime]\ndrop_pause = 1", "expected true or false"),
    ("[runtime]\ndrop_pause = 'true'", "expected true or false"),
    ("[runtime]\ndefault_handler = 'kata'", "expected a configured runtime handler: there is none"),
    ("[runtime]\ndefault_ulimits = ['nofile=5']", 'expected a list of "NAME=SOFT:HARD"'),
    ("[runtime]\ndefault_ulimits = ['nofiles=5:6']", "expected a list of"),
    ("[runtime]\ndefault_ulimits = ['nofile=6:5']", "expected a list of"),
    ("[runtime]\ndefault_sysctls = ['../x=1']", "expected a list of"),
    ("[runtime]\ndefault_env = 'A=b'", "expected a list of"),
    ("[runtime]\nlog_size_max = 100", "8192 bytes or more"),
    ("[runtime]\nhandlers = 1", "runtime.handlers = 1: expected a table"),
    ("[runtime.handlers]\ncrun = 1", "runtime.handlers.crun = 1: expected a table"),
    ("[runtime.handlers.'A B']\npath = '/x'", "expected a DNS label"),
    ("[runtime.handlers.x]\npaht = '/x'", 'runtime.handlers.x.paht: unknown key: did you mean "path"'),
    ("[image]\nmax_parallel_layers = 0", "expected a whole number from 1"),
    ("[image]\npinned_images = ['']", "expected a list of texts that are not empty"),
    ("[network]\nplugin_dirs = ['bin']", "expected a list of absolute paths"),
    ("[network]\ntimeout = 0", "expected seconds above 0"),
    ("[metrics]\nlisten = '9090'", 'expected "IP:PORT"'),
    ("[tracing]\nendpoint = 'localhost:4317'", "expected a URL"),
    ("[tracing]\nsampling_rate_per_million = 1000001", "expected a whole number from 0 to 1000000"),
    ("[log]\nlevel = 'loud'", 'log.level = "loud": expected one of "debug", "info", "warning", "error"'),
]


@pytest.mark.parametrize(("text", "complaint"), WRONG, ids=[text.replace("\n", " ")[:50] for text, _ in WRONG])
def test_what_is_wrong_is_said_with_its_file(tmp_path: Path, text: str, complaint: str) -> None:
    file = written(tmp_path, text)

    with pytest.raises(ConfigError, match=complaint) as caught:
        load(file, host=BARE)

    assert str(caught.value).startswith(f"{file}: ")


def test_a_wrong_flag_is_named_as_it_was_given() -> None:
    with pytest.raises(ConfigError, match=r'^--streaming-port: streaming.port = "many": expected a port'):
        load(host=BARE, flags={"streaming.port": ["many"]})


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: cannot be read: No such file"):
        load(tmp_path / "gone.toml", host=BARE)
    with pytest.raises(ConfigError, match="no such directory"):
        load(drop_ins=tmp_path / "gone", host=BARE)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "crito.toml"
    file.write_bytes(b"[log]\nlevel = '\xff'\n")

    with pytest.raises(ConfigError, match="not UTF-8"):
        load(file, host=BARE)


def test_an_executable_is_one_that_may_be_executed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "crun").write_text("not executable")
    (tmp_path / "b" / "crun").write_text("#!/bin/sh\n")
    (tmp_path / "b" / "crun").chmod(0o755)

    assert find_executable("crun", [tmp_path / "gone", tmp_path / "a", tmp_path / "b"]) == tmp_path / "b" / "crun"
    assert find_executable("runc", [tmp_path / "a"]) is None
