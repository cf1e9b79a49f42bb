import stat
from pathlib import Path

import pytest

from oci.bundle import Bundles
from oci.container_spec import ContainerId
from oci.errors import NotFound

ID = ContainerId("c1")


def test_a_runtime_spec_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    bundles = Bundles(tmp_path / "containers")
    config = {"process": {"env": ["A=\udcff", "B=é"]}}

    path = bundles.write(ID, config)

    assert bundles.read(ID) == config
    assert bundles.ids() == [ID]
    assert stat.S_IMODE((path / "config.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(path.stat().st_mode) == 0o711
    assert [entry.name for entry in path.iterdir()] == ["config.json"]


def test_a_removed_bundle_is_gone_and_removing_it_again_is_success(tmp_path: Path) -> None:
    bundles = Bundles(tmp_path)
    bundles.write(ID, {})

    bundles.remove(ID)
    bundles.remove(ID)

    assert bundles.ids() == []
    with pytest.raises(NotFound, match="c1"):
        bundles.read(ID)


def test_no_bundles_at_all_are_none(tmp_path: Path) -> None:
    assert Bundles(tmp_path / "missing").ids() == []
