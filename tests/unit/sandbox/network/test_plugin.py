import asyncio
import errno
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from oci.errors import DeadlineExceeded, Error, Unavailable
from sandbox.network import plugin as plugin_module
from sandbox.network.plugin import MAX_OUTPUT_BYTES, Call, PluginError, Plugins
from tests.fakes.cni_plugins import FakePlugins

SUBJECT = 'of pod shop/web to network "pods" as eth0'


@pytest.fixture
def fakes(tmp_path: Path) -> FakePlugins:
    return FakePlugins(tmp_path / "bin")


def run(fakes: FakePlugins, verb: str = "ADD", plugin: str = "fake", timeout_s: float = 5.0, **config: Any) -> Any:
    plugins = Plugins((fakes.directory,), timeout_s)
    return asyncio.run(plugins.run(Call(verb, plugin, SUBJECT, {"CNI_IFNAME": "eth0"}, config)))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_plugin_gets_its_configuration_on_stdin_and_its_parameters_in_the_environment(fakes: FakePlugins) -> None:
    fakes.write("fake", add="echo '{\"ips\": []}'")

    assert run(fakes, key=["a value"]) == {"ips": []}
    (call,) = fakes.calls
    assert (call.verb, call.ifname, call.path) == ("ADD", "eth0", str(fakes.directory))
    assert call.config == {"key": ["a value"]}


def test_what_systemd_tells_the_daemon_is_not_told_to_plugins(
    fakes: FakePlugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("LISTEN_FDS", "3")
    monkeypatch.setenv("CNI_NETNS", "/of/somebody/else")
    monkeypatch.setenv("HTTPS_PROXY", "proxy:3128")
    fakes.write_script("fake", 'echo "{\\"seen\\": \\"$NOTIFY_SOCKET$LISTEN_FDS$CNI_NETNS$HTTPS_PROXY\\"}"')

    assert run(fakes) == {"seen": "proxy:3128"}


def test_the_first_directory_that_has_the_plugin_wins(tmp_path: Path) -> None:
    first, second = FakePlugins(tmp_path / "first"), FakePlugins(tmp_path / "second")
    second.write("fake")
    (first.directory / "fake").write_text("not executable")
    plugins = Plugins((tmp_path / "none", first.directory, second.directory), 5)

    assert plugins.find("fake") == second.directory / "fake"


def test_a_plugin_that_is_nowhere_is_named_with_the_directories_searched(fakes: FakePlugins) -> None:
    with pytest.raises(Unavailable, match=f"CNI plugin absent: no such executable in {fakes.directory}"):
        run(fakes, plugin="absent")


def test_a_plugin_that_writes_nothing_answers_nothing(fakes: FakePlugins) -> None:
    fakes.write("fake", **{"del": "true"})

    assert run(fakes, "DEL") is None


def test_a_failing_plugins_own_code_message_and_details_are_in_the_error(fakes: FakePlugins) -> None:
    fakes.write(
        "fake", add='echo \'{"code": 7, "msg": "Invalid Configuration", "details": "subnet too small"}\'; exit 1'
    )

    with pytest.raises(PluginError) as error:
        run(fakes)

    assert str(error.value) == (
        f"CNI ADD {SUBJECT}: plugin fake failed with code 7: Invalid Configuration: subnet too small"
    )
    assert error.value.code == 7
    assert not isinstance(error.value, Unavailable)


@pytest.mark.parametrize("code", [11, 50, 51])
def test_a_plugin_that_says_try_again_is_unavailable(fakes: FakePlugins, code: int) -> None:
    fakes.write("fake", add=f'echo \'{{"code": {code}, "msg": "not now"}}\'; exit 1')

    with pytest.raises(Unavailable, match=f"failed with code {code}: not now"):
        run(fakes)


def test_a_plugin_that_fails_without_json_is_quoted(fakes: FakePlugins) -> None:
    fakes.write("fake", add="echo half an answer; echo panic: oh no >&2; exit 3")

    with pytest.raises(PluginError) as error:
        run(fakes)

    assert "exited with 3 without saying why in JSON; stdout: 'half an answer'; stderr: 'panic: oh no'" in str(
        error.value
    )


def test_a_plugin_that_dies_of_a_signal_is_an_error_that_names_it(fakes: FakePlugins) -> None:
    fakes.write("fake", add="kill -SEGV $$")

    with pytest.raises(PluginError, match="plugin fake was killed by SIGSEGV"):
        run(fakes)


@pytest.mark.parametrize("answer", ["not json", "[1]", '"text"', "{", "\\377\\376"])
def test_a_success_with_garbage_is_an_error_that_shows_the_garbage(fakes: FakePlugins, answer: str) -> None:
    fakes.write("fake", add=f"printf '{answer}'")

    with pytest.raises(Error, match="succeeded, but its answer is not a JSON object: '"):
        run(fakes)


def test_a_flood_of_output_ends_in_an_error_not_in_memory(fakes: FakePlugins) -> None:
    fakes.write("fake", add=f"head -c {MAX_OUTPUT_BYTES + 100_000} /dev/zero")

    with pytest.raises(Error, match=f"wrote more than {MAX_OUTPUT_BYTES} bytes"):
        run(fakes)


def test_a_plugin_need_not_read_its_configuration(fakes: FakePlugins) -> None:
    fakes.write_script("fake", "exec 0<&-; echo '{}'")

    assert run(fakes, filler="x" * 1_000_000) == {}


def test_a_hanging_plugin_is_killed_with_all_that_it_runs_and_named(fakes: FakePlugins, tmp_path: Path) -> None:
    fakes.write_script("fake", f"sleep 1000 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/self; wait")
    started = time.monotonic()

    with pytest.raises(DeadlineExceeded) as error:
        run(fakes, timeout_s=0.5)

    assert time.monotonic() - started < 3
    assert f"CNI ADD {SUBJECT}: plugin fake ({fakes.directory}/fake) did not end within 0.5 s" in str(error.value)
    assert not is_alive(int((tmp_path / "self").read_text()))
    time.sleep(0.05)
    assert not is_alive(int((tmp_path / "child").read_text()))


def test_a_cancelled_call_ends_its_plugin(fakes: FakePlugins, tmp_path: Path) -> None:
    fakes.write_script(
        "fake", f"echo $$ > {tmp_path}/self.new; mv {tmp_path}/self.new {tmp_path}/self; exec sleep 1000"
    )

    async def cancel_when_it_runs() -> None:
        plugins = Plugins((fakes.directory,), 60)
        task = asyncio.create_task(plugins.run(Call("ADD", "fake", SUBJECT, {}, {})))
        while not (tmp_path / "self").exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_when_it_runs())

    assert not is_alive(int((tmp_path / "self").read_text()))


def test_a_helper_that_outlives_its_plugin_does_not_hold_up_the_answer(fakes: FakePlugins, tmp_path: Path) -> None:
    fakes.write_script("fake", f"sleep 5 & echo $! > {tmp_path}/helper; echo '{{}}'")
    started = time.monotonic()

    assert run(fakes) == {}

    assert time.monotonic() - started < 3
    os.kill(int((tmp_path / "helper").read_text()), 9)


def test_a_plugin_that_is_being_replaced_in_place_is_tried_again(fakes: FakePlugins) -> None:
    path = fakes.write("fake", add="echo '{}'")

    async def replace_while_running() -> Any:
        with path.open("ab"):  # execve says ETXTBSY while somebody writes
            task = asyncio.create_task(Plugins((fakes.directory,), 5).run(Call("ADD", "fake", SUBJECT, {}, {})))
            await asyncio.sleep(0.15)
        return await task

    assert asyncio.run(replace_while_running()) == {}


def test_a_file_that_the_kernel_cannot_execute_is_named(fakes: FakePlugins) -> None:
    (fakes.directory / "fake").write_bytes(b"\x7fELF but no more")
    (fakes.directory / "fake").chmod(0o755)

    with pytest.raises(Unavailable, match=f"{fakes.directory}/fake cannot be executed: {os.strerror(errno.ENOEXEC)}"):
        run(fakes)


def test_a_plugin_that_stalls_is_logged_while_it_still_runs(
    fakes: FakePlugins, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugin_module, "STALL_S", 0.1)
    fakes.write("fake", add="sleep 0.4; echo '{}'")

    with caplog.at_level(logging.WARNING):
        run(fakes)

    assert f"CNI ADD {SUBJECT}: plugin fake still runs after 0.1 s" in caplog.text


def test_no_descriptor_is_left_open(fakes: FakePlugins) -> None:
    fakes.write("fake", add="echo '{}'", check="exit 1")

    async def many() -> int:
        plugins = Plugins((fakes.directory,), 5)
        await plugins.run(Call("ADD", "fake", SUBJECT, {}, {}))
        await asyncio.sleep(0)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            await plugins.run(Call("ADD", "fake", SUBJECT, {}, {}))
            with pytest.raises(PluginError):
                await plugins.run(Call("CHECK", "fake", SUBJECT, {}, {}))
        await asyncio.sleep(0.1)
        return len(list(Path("/proc/self/fd").iterdir())) - before

    assert asyncio.run(many()) <= 0
