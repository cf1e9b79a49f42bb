"""What `crito check` concludes from what it finds."""

import json
from pathlib import Path

import pytest

from cri import check
from cri.check import Finding, Weight, can_run, text
from cri.config import CgroupDriver, Config, CritoSection, ImageSection, RuntimeHandler, RuntimeSection
from oci.linux.cgroup import Cgroups, Hierarchy

GOOD = Finding("kernel", True, Weight.REQUIRED, "6.1")
BAD = Finding("overlayfs", False, Weight.REQUIRED, "cannot be mounted", "containers need it")
ODD = Finding("AppArmor", False, Weight.SOME, "not in this kernel", "pods that name it are refused")


def test_only_what_is_required_keeps_pods_from_running() -> None:
    assert can_run([GOOD, ODD])
    assert not can_run([GOOD, BAD])


def test_a_line_says_what_was_seen_and_a_lack_what_it_means() -> None:
    lines = text([GOOD, ODD]).splitlines()

    assert lines[0] == "✓ kernel    6.1"
    assert lines[1] == "✗ AppArmor  not in this kernel"
    assert lines[2].strip() == "→ pods that name it are refused"
    assert lines[-1] == "Pods can run here."
    assert text([BAD]).endswith("Pods cannot run here: see the lines marked ✗.")


@pytest.mark.parametrize(
    ("release", "ok"),
    [("6.18.44-fc-v669", True), ("5.12.0", True), ("5.11.22-generic", False), ("4.19", False), ("6.1-rc3+", True)],
)
def test_the_kernel_must_be_new_enough(release: str, ok: bool) -> None:
    assert check._kernel(release).ok is ok


def test_missing_controllers_are_named() -> None:
    cgroups = Cgroups((Hierarchy(Path("/sys/fs/cgroup"), frozenset({"cpu", "memory"}), True),))

    findings = {finding.name: finding for finding in check._cgroups(cgroups, CgroupDriver.CGROUPFS)}

    assert findings["cgroups"].seen == "v2"
    assert findings["cgroup controllers"].seen == "lacks cpuset, pids"
    assert findings["cgroup controllers"].weight is Weight.SOME


def test_no_user_namespaces_is_no_obstacle_to_most_pods(tmp_path: Path) -> None:
    for name in check.NAMESPACES:
        (tmp_path / name).touch()
    (tmp_path / "max").write_text("0\n")

    findings = list(check._namespaces(tmp_path, tmp_path / "max"))

    assert [finding.ok for finding in findings] == [True, False]
    assert can_run(findings)


def test_json_has_every_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "examine", lambda _config: iter([GOOD, BAD]))

    assert check.main(Config(), as_json=True) == 1
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == ["kernel", "overlayfs"]


def test_policies_that_are_wrong_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "policy.json").write_text('{"default": [{"type": "reject"}]}')
    config = Config(image=ImageSection(policy=tmp_path / "policy.json", policy_dir=tmp_path / "policies"))
    assert [finding.ok for finding in check._policies(config)] == [True]

    (tmp_path / "policies").mkdir()
    (tmp_path / "policies/wrong.json").write_text("{")
    lost = [{"type": "sigstoreSigned", "keyPath": str(tmp_path / "lost")}]
    (tmp_path / "policies/lost.json").write_text(json.dumps({"default": lost}))
    gpg = [{"type": "signedBy", "keyType": "GPGKeys", "keyData": "a2V5"}]
    content = {"default": [{"type": "reject"}], "transports": {"docker": {"a.io": gpg}}}
    (tmp_path / "policies/gpg.json").write_text(json.dumps(content))
    monkeypatch.setattr(check, "find_executable", lambda *_: None)

    policies, gpgv = check._policies(config)
    assert not policies.ok
    assert not gpgv.ok
    assert can_run([policies, gpgv])
    assert "wrong.json is not JSON" in policies.seen
    assert f"{tmp_path}/lost: No such file" in policies.seen


def test_files_of_hooks_and_devices_that_are_wrong_are_named(tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text("{")
    config = Config(runtime=RuntimeSection(cdi_spec_dirs=(tmp_path,), hooks_dir=(tmp_path,)))

    devices, hooks = check._described(config)

    assert not can_run([hooks])
    assert can_run([devices])
    assert all("wrong.json: " in finding.seen and not finding.ok for finding in (devices, hooks))
    assert all(
        finding.ok for finding in check._described(Config(runtime=RuntimeSection(cdi_spec_dirs=(), hooks_dir=())))
    )


def test_runsc_without_sandboxes_of_its_own_is_advised_against(tmp_path: Path) -> None:
    program = tmp_path / "runsc"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    section = CritoSection(root=tmp_path / "root", run_dir=tmp_path / "run")

    def findings(by_runtime: bool) -> list[str]:
        handler = RuntimeHandler(path=program, root=tmp_path / "state", sandbox_by_runtime=by_runtime)
        config = Config(crito=section, runtime=RuntimeSection(handlers={"gvisor": handler}))
        return [each.meaning for each in check._runtimes(config)]

    assert any("sandbox_by_runtime" in meaning for meaning in findings(False))
    assert not any("sandbox_by_runtime" in meaning for meaning in findings(True))
