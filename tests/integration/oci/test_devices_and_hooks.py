"""What CDI descriptions and OCI hooks do to real containers."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from oci.cdi import Cdi
from oci.cdi_edits import edited
from oci.container_spec import ContainerSpec
from oci.hook_files import HookFiles
from oci.linux import cgroup

from .conftest import Host, shell


def run(machine: Host, wanted: ContainerSpec, devices: tuple[str, ...] = (), annotations: Any = None) -> str:
    """The output of a container with CDI devices and hooks, as CreateContainer puts them in."""
    id, config = machine.prepare(wanted)
    edits = Cdi([machine.directory / "cdi"]).resolve(devices)
    config = edited(config, edits, idmap_mounts=machine.features.idmap_mounts)
    config = HookFiles([machine.directory / "hooks.d"]).inject(config, annotations or {}, False)
    machine.bundles.write(id, config)
    done = machine.command("run", "--bundle", str(machine.bundles.path(id)), id)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert not cgroup.detect().exists(machine.cgroup(id))
    return done.stdout


def describe(machine: Host, edits: dict[str, Any], shared: dict[str, Any] | None = None) -> None:
    directory = machine.directory / "cdi"
    directory.mkdir()
    (directory / "vendor.yaml").write_text(
        json.dumps(
            {
                "cdiVersion": "0.7.0",
                "kind": "vendor.com/gpu",
                "containerEdits": shared or {},
                "devices": [{"name": "0", "containerEdits": edits}],
            }
        )
    )


def hook(machine: Host, name: str, script: str) -> str:
    path = machine.directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_device_is_visible_with_all_that_its_vendor_says(machine: Host) -> None:
    library = machine.directory / "library"
    library.mkdir()
    (library / "gpu.so").write_text("the library")
    called = machine.directory / "called"
    describe(
        machine,
        {
            "deviceNodes": [
                {"path": "/dev/vendor/gpu0", "hostPath": "/dev/zero", "fileMode": 0o644, "gid": 44},
                {"path": "/dev/vendor/log", "hostPath": "/dev/kmsg", "permissions": "r"},  # none that all may use
            ],
            "mounts": [{"hostPath": str(library), "containerPath": "/opt/gpu", "options": ["ro", "rbind"]}],
            "env": ["GPU=0"],
            "additionalGids": [44],
        },
        {"hooks": [{"hookName": "createRuntime", "path": hook(machine, "cdi-hook", f"cat > {called}")}]},
    )
    script = (
        "head -c 4 /dev/vendor/gpu0 | od -An -tx1; stat -c '%t %T %a %g' /dev/vendor/gpu0; cat /opt/gpu/gpu.so; echo;"
        " echo $GPU; id -G; echo x > /dev/vendor/log || echo not to be written; touch /opt/gpu/x || echo read-only"
    )

    lines = run(machine, shell(script), ("vendor.com/gpu=0",)).splitlines()

    assert [line.strip() for line in lines] == [
        "00 00 00 00",
        "1 5 644 44",
        "the library",
        "0",
        "0 44",
        "not to be written",
        "read-only",
    ]
    assert json.loads(called.read_text())["ociVersion"]


def test_a_process_that_is_not_root_owns_its_devices(machine: Host) -> None:
    describe(machine, {"deviceNodes": [{"path": "/dev/mine", "hostPath": "/dev/null"}]})
    wanted = shell("stat -c '%u %g' /dev/mine; echo x > /dev/mine && echo written")
    wanted = replace(wanted, security=replace(wanted.security, run_as_user=1000, run_as_group=1001))

    assert run(machine, wanted, ("vendor.com/gpu=0",)).splitlines() == ["1000 1001", "written"]


def test_hooks_run_at_their_stages_for_the_containers_that_match(machine: Host) -> None:
    directory, seen = machine.directory / "hooks.d", machine.directory / "seen"
    directory.mkdir()
    for stage in ("prestart", "createContainer", "poststart", "poststop"):
        program = hook(machine, f"{stage}-hook", f'echo "{stage} $1 $WHO" >> {seen}')
        file = {
            "version": "1.0.0",
            "hook": {"path": program, "args": ["hook", stage.upper()], "env": ["WHO=me", f"PATH={os.environ['PATH']}"]},
            "when": {"annotations": {r"^com\.example\.hooked$": "^yes$"}},
            "stages": [stage],
        }
        (directory / f"{stage}.json").write_text(json.dumps(file))

    run(machine, shell("true"), annotations={"com.example.hooked": "no"})
    assert not seen.exists()
    run(machine, shell("true"), annotations={"com.example.hooked": "yes"})

    assert sorted(Path(seen).read_text().splitlines()) == [
        "createContainer CREATECONTAINER me",
        "poststart POSTSTART me",
        "poststop POSTSTOP me",
        "prestart PRESTART me",
    ]
