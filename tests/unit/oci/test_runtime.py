import asyncio
import time
from pathlib import Path

import pytest

from oci import runtime
from oci.container_spec import ContainerId
from oci.errors import DeadlineExceeded, Error, FailedPrecondition, NotFound, Unimplemented
from oci.linux import cgroup, proc
from oci.spec import RuntimeFeatures

ID = ContainerId("c1")


def fake(directory: Path, script: str, driver: cgroup.Driver = cgroup.Driver.CGROUPFS) -> runtime.Runtime:
    path = directory / "fake"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return runtime.Runtime("fake", path, directory / "root", driver)


def test_the_prefix_of_commands_names_root_log_and_driver(tmp_path: Path) -> None:
    made = fake(tmp_path, "", cgroup.Driver.SYSTEMD)

    assert made.argv == (
        str(tmp_path / "fake"),
        "--root",
        str(tmp_path / "root"),
        "--log-format",
        "json",
        "--systemd-cgroup",
    )


def test_a_state_is_read(tmp_path: Path) -> None:
    made = fake(tmp_path, 'echo \'{"status":"running","pid":7,"bundle":"/b","more":1}\'')

    assert asyncio.run(made.state(ID)) == runtime.RuntimeState("running", 7, "/b")


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ('{"level":"error","msg":"container does not exist"}', NotFound),
        ("error opening file `/root/c1/status`: No such file or directory", NotFound),
        ("loading container: file does not exist", NotFound),
        ('{"level":"error","msg":"container not running"}', FailedPrecondition),
        ("unknown command features", Unimplemented),
        ('{"level":"error","msg":"open /sys/x: no such file or directory"}', Error),
        ("", Error),
    ],
)
def test_what_a_runtime_says_becomes_an_error_of_its_kind(tmp_path: Path, said: str, kind: type[Error]) -> None:
    made = fake(tmp_path, f"echo '{said}' >&2; exit 1")

    with pytest.raises(kind) as caught:
        asyncio.run(made.kill(ID, 15))

    assert type(caught.value) is kind
    assert str(caught.value).startswith("fake: kill c1 15: ")


def test_that_a_container_is_gone_already_is_a_successful_delete(tmp_path: Path) -> None:
    asyncio.run(fake(tmp_path, 'echo "container does not exist" >&2; exit 1').delete(ID))


def test_a_runtime_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    made = fake(tmp_path, f"sleep 61 & echo $! > {tmp_path}/pid; wait")
    began = time.monotonic()

    with pytest.raises(DeadlineExceeded, match=r"fake: state c1: .* within 0\.3 s"):
        asyncio.run(made.state(ID, timeout_s=0.3))

    assert time.monotonic() - began < 10
    found = proc.stat(int((tmp_path / "pid").read_text()))
    assert found is None or found.state in "ZX"


def test_a_runtime_that_is_not_there_says_so(tmp_path: Path) -> None:
    made = runtime.Runtime("none", tmp_path / "none", tmp_path, cgroup.Driver.CGROUPFS)

    with pytest.raises(FailedPrecondition, match=r"cannot run .*none: No such file"):
        asyncio.run(made.version())


def test_resources_go_in_as_json(tmp_path: Path) -> None:
    made = fake(tmp_path, f'echo "$@" > {tmp_path}/argv; cat > {tmp_path}/stdin')

    asyncio.run(made.update(ID, {"memory": {"limit": 5}}))

    assert (tmp_path / "argv").read_text().split()[-4:] == ["update", "--resources", "-", "c1"]
    assert (tmp_path / "stdin").read_text() == '{"memory": {"limit": 5}}'


def test_features_are_read_or_the_least(tmp_path: Path) -> None:
    said = '{"mountOptions":["ro","rro"],"linux":{"mountExtensions":{"idmap":{"enabled":true}}}}'

    assert asyncio.run(fake(tmp_path, f"echo '{said}'").features()) == RuntimeFeatures(True, True, 0)
    assert asyncio.run(fake(tmp_path, "exit 1").features()) == RuntimeFeatures()
    assert runtime.features_from({}, 5).min_memory_bytes == 5


def test_errors_are_taken_from_the_log_and_told_once() -> None:
    output = b"""\
{"level":"debug","msg":"noise"}
{"level":"warning","msg":"noise"}
{"level":"error","msg":"it broke","time":"x"}
{"level":"error","msg":"it broke","time":"y"}
plain
"""

    assert runtime.error_text(output) == "it broke"
    assert runtime.error_text(b"one\n\xfftwo\n") == "one; \ufffdtwo"


def test_installed_runtimes_are_found_in_order(tmp_path: Path) -> None:
    for name in ("runc", "crun", "text"):
        (tmp_path / name).touch(mode=0o755 if name != "text" else 0o644)

    found = runtime.find(("crun", "youki", "runc", "text"), [str(tmp_path)])

    assert list(found) == ["crun", "runc"]


def test_a_canary_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    made = fake(tmp_path, '[ "$5" = run ] || exit 0; echo "no cgroups here" >&2; exit 1')
    (tmp_path / "canary").mkdir()

    outcome = asyncio.run(made.canary(tmp_path / "canary", "/"))

    assert not outcome.ok
    assert "no cgroups here" in outcome.reason
    assert list((tmp_path / "canary").iterdir()) == []


def test_a_container_in_a_sandbox_is_waited_for_and_counted_by_its_runtime(tmp_path: Path) -> None:
    stats = '{"data":{"cpu":{"usage":{"total":5}},"memory":{"usage":{"usage":7}},"pids":{}}}'
    made = fake(tmp_path, f"""case "$5" in wait) echo '{{"id":"c1","exitStatus":143}}';; *) echo '{stats}';; esac""")

    assert asyncio.run(made.wait(ID)) == 143
    assert asyncio.run(made.usage(ID)) == runtime.Usage(5, 7, None)


@pytest.mark.parametrize("body", ["echo nothing", "echo 'connection refused' >&2; exit 128"])
def test_an_exit_that_the_runtime_does_not_tell_is_an_error(tmp_path: Path, body: str) -> None:
    with pytest.raises(Error, match="wait c1"):
        asyncio.run(fake(tmp_path, body).wait(ID))


def test_all_that_a_runtime_keeps_of_a_container_or_a_sandbox_is_forgotten(tmp_path: Path) -> None:
    made = fake(tmp_path, "")
    (made.root / "c1").mkdir(parents=True)
    for name in (
        "c1_sandbox:s1.state",
        "c1_sandbox:s1.lock",
        "c2_sandbox:s1.lock",
        "runsc-s1.sock",
        "c3_sandbox:s3.lock",
    ):
        (made.root / name).touch()

    made.forget("c1")
    assert {path.name for path in made.root.iterdir()} == {"c2_sandbox:s1.lock", "runsc-s1.sock", "c3_sandbox:s3.lock"}
    made.forget("s1")
    assert {path.name for path in made.root.iterdir()} == {"c3_sandbox:s3.lock"}


def test_a_runtime_that_makes_sandboxes_makes_no_checkpoints(tmp_path: Path) -> None:
    fake(tmp_path, "echo --image-path")
    made = runtime.Runtime("gvisor", tmp_path / "fake", tmp_path / "root", cgroup.Driver.CGROUPFS, makes_sandboxes=True)

    assert not asyncio.run(made.can_checkpoint())


def test_a_canary_has_no_device_of_the_hosts_as_its_stdin(tmp_path: Path) -> None:
    """runsc gives it to the user of its sandbox, who would then own the host's /dev/null."""
    made = fake(tmp_path, f'[ "$5" != run ] || readlink /proc/$$/fd/0 > {tmp_path}/stdin')
    (tmp_path / "canary").mkdir()

    asyncio.run(made.canary(tmp_path / "canary", "/"))

    assert not (tmp_path / "stdin").read_text().startswith("/")
