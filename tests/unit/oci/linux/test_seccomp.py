from typing import Any

import pytest

from oci.errors import InvalidArgument
from oci.linux import seccomp

AMD64 = seccomp.architecture("x86_64")


def action(profile: dict[str, Any], name: str) -> list[tuple[str, int | None]]:
    return [(rule["action"], rule.get("errnoRet")) for rule in profile["syscalls"] if name in rule["names"]]


def test_the_default_profile_allows_refuses_and_does_not_know() -> None:
    profile = seccomp.default_profile(["CAP_CHOWN"], AMD64)

    assert action(profile, "openat2") == [("SCMP_ACT_ALLOW", None)]
    assert action(profile, "kexec_load") == [("SCMP_ACT_ERRNO", 1)]
    assert action(profile, "mount") == [("SCMP_ACT_ERRNO", 1)]
    assert action(profile, "clone3") == [("SCMP_ACT_ERRNO", 38)]
    assert action(profile, "invented_tomorrow") == []
    assert (profile["defaultAction"], profile["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", 38)
    assert profile["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]


def test_a_capability_brings_its_system_calls() -> None:
    profile = seccomp.default_profile(["CAP_SYS_ADMIN", "CAP_SYSLOG"], AMD64)

    for name in ("mount", "setns", "clone", "clone3", "syslog", "sethostname"):
        assert action(profile, name) == [("SCMP_ACT_ALLOW", None)]
    assert action(profile, "reboot") == [("SCMP_ACT_ERRNO", 1)]


def test_no_call_is_both_allowed_and_refused_without_arguments() -> None:
    for capabilities in ([], ["CAP_SYS_ADMIN"], ["CAP_BPF", "CAP_PERFMON"]):
        rules = [rule for rule in seccomp.default_profile(capabilities, AMD64)["syscalls"] if "args" not in rule]
        names = [name for rule in rules for name in rule["names"]]

        assert len(names) == len(set(names))


def test_architectures_have_their_own_calls() -> None:
    arm = seccomp.default_profile([], seccomp.architecture("aarch64"))

    assert action(arm, "arm_fadvise64_64") == [("SCMP_ACT_ALLOW", None)]
    assert action(arm, "arch_prctl") == []
    assert "architectures" not in seccomp.default_profile([], seccomp.architecture("unheard-of"))


def docker_profile(**rule: Any) -> dict[str, Any]:
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
        "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": None, "comment": "", **rule}],
    }


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        ({}, True),
        ({"includes": {"caps": ["CAP_BPF"]}}, True),
        ({"includes": {"caps": ["CAP_CHOWN"]}}, False),
        ({"excludes": {"caps": ["CAP_BPF"]}}, False),
        ({"includes": {"arches": ["amd64"]}}, True),
        ({"includes": {"arches": ["arm64"]}}, False),
        ({"excludes": {"arches": ["amd64"]}}, False),
        ({"includes": {"minKernel": "5.10"}}, True),
        ({"includes": {"minKernel": "6.2"}}, False),
        ({"excludes": {"minKernel": "6.1"}}, False),
    ],
)
def test_dockers_conditions_choose_rules(conditions: dict[str, Any], kept: bool) -> None:
    profile = seccomp.from_profile(docker_profile(**conditions), ["CAP_BPF"], AMD64, name="p", kernel="6.1.0-13-amd64")

    assert profile["syscalls"] == ([{"names": ["read"], "action": "SCMP_ACT_ALLOW"}] if kept else [])
    assert profile["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert "archMap" not in profile


def test_the_runtime_specs_format_is_kept() -> None:
    given = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [{"name": "old", "action": "SCMP_ACT_ERRNO", "errnoRet": 5}],
    }

    profile = seccomp.from_profile(given, [], AMD64, name="p")

    assert profile["flags"] == ["SECCOMP_FILTER_FLAG_LOG"]
    assert profile["syscalls"] == [{"names": ["old"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5}]


@pytest.mark.parametrize(
    "given",
    [{}, {"defaultAction": 5}, {"defaultAction": "X", "syscalls": [{}]}, {"defaultAction": "X", "syscalls": ["read"]}],
)
def test_a_malformed_profile_is_named(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"seccomp profile /p\.json"):
        seccomp.from_profile(given, [], AMD64, name="/p.json")
