"""Which specs of the conformance suite may be skipped: those for which something is lacking, and no others."""

from pathlib import Path

import pytest

from critest import lacks
from critest.__main__ import Spec, _judged
from critest.lacks import LACKS, features, reason_to_skip, skips

IDMAP = {"linux": {"mountExtensions": {"idmap": {"enabled": True}}}}
USERNS = "[k8s.io] Security Context UserNamespaces when needed runtime should support NamespaceMode_POD"
RRO = (
    "[k8s.io] Container Mount Readonly runtime should support readonly mounts should support recursive readonly mounts"
)
APPARMOR = "[k8s.io] AppArmor runtime should support apparmor field should work"


def test_each_line_names_something_that_can_be_looked_up_and_a_reason() -> None:
    assert {skip.lacks for skip in skips()} <= set(LACKS)
    assert all(skip.spec and skip.reason for skip in skips())


def test_specs_may_be_skipped_only_while_the_runtime_cannot_do_what_they_need() -> None:
    assert reason_to_skip(USERNS, {})
    assert not reason_to_skip(USERNS, IDMAP)
    assert reason_to_skip(RRO, {"mountOptions": ["ro"]})
    assert not reason_to_skip(RRO, {"mountOptions": ["ro", "rro"]})
    assert not reason_to_skip("[k8s.io] Streaming runtime should support exec", {})


@pytest.mark.parametrize(("text", "may_be_skipped"), [("N\n", True), ("Y\n", False)])
def test_apparmor_is_looked_up(
    text: str, may_be_skipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "enabled").write_text(text)
    monkeypatch.setattr(lacks, "APPARMOR", tmp_path / "enabled")

    assert bool(reason_to_skip(APPARMOR, {})) is may_be_skipped


def test_what_a_runtime_tells_of_its_features_is_believed_and_silence_is_none(tmp_path: Path) -> None:
    telling, silent = tmp_path / "telling", tmp_path / "silent"
    telling.write_text("""#!/bin/sh\n[ "$1" = features ] && echo '{"mountOptions": ["rro"]}'\n""")
    silent.write_text("#!/bin/sh\necho unknown command features >&2; exit 1\n")
    for program in (telling, silent):
        program.chmod(0o755)

    assert features(telling) == {"mountOptions": ["rro"]}
    assert features(silent) == {}


def test_a_spec_that_skips_itself_without_a_reason_of_ours_has_failed() -> None:
    specs = [
        Spec("passes", "passed", 1, ""),
        Spec(USERNS, "skipped", 0, "no runtime handler found which supports user namespaces"),
        Spec("other", "skipped", 0, "I do not like this runtime"),
        Spec("not in focus", "skipped", 0, ""),
    ]

    assert [(spec.name, spec.state) for spec in _judged(specs, {})] == [
        ("passes", "passed"),
        (USERNS, "skipped"),
        ("other", "failed"),
    ]
    assert [spec.state for spec in _judged(specs, IDMAP)] == ["passed", "failed", "failed"]
