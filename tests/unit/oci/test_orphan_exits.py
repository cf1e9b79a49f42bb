"""Exits of processes that lost their monitor are kept for as long as somebody may ask."""

from pathlib import Path

from oci.exit_records import forget_orphan_exits, read_orphan_exit

RECORD = '{"pid": 7, "start_time": 70, "exit_code": 3, "signal": 0, "finished_at": 1}'


def test_only_the_exits_that_nobody_will_ask_about_are_removed(tmp_path: Path) -> None:
    (tmp_path / "orphans").mkdir()
    for name in ("7-70", "7-71", "8-80"):
        (tmp_path / "orphans" / f"{name}.json").write_text(RECORD)

    forget_orphan_exits(tmp_path, [(7, 70), (9, 90)])

    assert [path.name for path in (tmp_path / "orphans").iterdir()] == ["7-70.json"]
    kept = read_orphan_exit(tmp_path, 7, 70)
    assert kept is not None and kept.exit_code == 3


def test_without_a_directory_there_is_nothing_to_remove(tmp_path: Path) -> None:
    forget_orphan_exits(tmp_path, [])

    assert list(tmp_path.iterdir()) == []
