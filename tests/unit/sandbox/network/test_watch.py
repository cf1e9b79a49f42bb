import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox.network.watch import DirectoryWatch


def told(directories: tuple[Path, ...], *steps: Callable[[], object]) -> list[bool]:
    """For each step, whether the watch told of a change after it."""

    async def watch() -> list[bool]:
        changed = asyncio.Event()
        watch = DirectoryWatch(directories, changed.set)
        watch.start()
        answers: list[bool] = []
        for step in steps:
            changed.clear()
            step()
            await asyncio.sleep(0.05)
            answers.append(changed.is_set())
        watch.close()
        return answers

    return asyncio.run(watch())


def test_a_file_that_is_written_renamed_or_removed_is_told(tmp_path: Path) -> None:
    path = tmp_path / "10.conflist"

    assert told(
        (tmp_path,),
        lambda: path.write_text("{}"),
        lambda: path.rename(tmp_path / "20.conflist"),
        (tmp_path / "20.conflist").unlink,
        lambda: None,
    ) == [True, True, True, False]


def test_a_directory_that_is_made_later_is_followed_from_then_on(tmp_path: Path) -> None:
    conf_dir = tmp_path / "etc" / "cni" / "net.d"

    assert told(
        (conf_dir,),
        (tmp_path / "unrelated").mkdir,
        (tmp_path / "etc").mkdir,
        conf_dir.parent.mkdir,
        conf_dir.mkdir,
        lambda: (conf_dir / "10.conflist").write_text("{}"),
    ) == [False, True, True, True, True]


def test_a_directory_that_is_removed_and_made_again_is_followed(tmp_path: Path) -> None:
    conf_dir = tmp_path / "net.d"
    conf_dir.mkdir()

    assert told((conf_dir,), conf_dir.rmdir, conf_dir.mkdir, lambda: (conf_dir / "10.conflist").write_text("{}")) == [
        True,
        True,
        True,
    ]


def test_a_link_that_is_pointed_elsewhere_is_followed(tmp_path: Path) -> None:
    link, old, new = tmp_path / "net.d", tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    link.symlink_to(old)

    def point_elsewhere() -> None:
        (tmp_path / "next").symlink_to(new)
        (tmp_path / "next").rename(link)

    assert told(
        (link,),
        point_elsewhere,
        lambda: (new / "10.conflist").write_text("{}"),
        lambda: (old / "10.conflist").write_text("{}"),
    ) == [True, True, False]


def test_the_folder_of_a_network_is_followed_too(tmp_path: Path) -> None:
    folder = tmp_path / "pods"

    assert told((tmp_path,), folder.mkdir, lambda: (folder / "10-tuning.conf").write_text("{}")) == [True, True]


def test_without_inotify_nothing_is_told_and_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoInotify:
        def inotify_init1(self, flags: int) -> int:
            return -1

    monkeypatch.setattr("sandbox.network.watch.ctypes.CDLL", lambda *_, **__: NoInotify())

    assert told((tmp_path,), lambda: (tmp_path / "10.conflist").write_text("{}")) == [False]


def test_closing_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))

    told((tmp_path,), lambda: None)

    assert len(list(Path("/proc/self/fd").iterdir())) == before
