import logging
from dataclasses import replace
from pathlib import Path

import pytest

from oci.container_spec import SandboxId
from sandbox.network.attachment import Attachment, PodNetworkRequest
from sandbox.network.ledger import Entry, Ledger
from sandbox.spec import DnsConfig, PortMapping, Protocol

ENTRY = Entry(
    PodNetworkRequest(
        SandboxId("a" * 64),
        "web",
        "shop",
        "u-1",
        "/run/netns/x",
        (PortMapping(Protocol.TCP, 80, 8080),),
        {"a": "b"},
        DnsConfig(("10.0.0.10",)),
        "/kubepods",
    ),
    Attachment("pods", "eth0", '{"name": "pods"}'),
)


def test_an_entry_is_kept_as_written_until_it_is_forgotten(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "network")
    attached = replace(ENTRY, attachment=replace(ENTRY.attachment, result="{}"))

    ledger.write(ENTRY)
    assert ledger.read() == (ENTRY,)
    ledger.write(attached)
    assert ledger.read() == (attached,)
    ledger.forget(ENTRY.key)
    ledger.forget(ENTRY.key)

    assert ledger.read() == ()
    assert list((tmp_path / "network").iterdir()) == []


def test_an_unreadable_entry_is_named_and_does_not_hide_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(ENTRY)
    (tmp_path / "bad-eth0.json").write_text("")
    (tmp_path / "half-eth0.new").write_text("{")

    with caplog.at_level(logging.ERROR):
        assert ledger.read() == (ENTRY,)

    assert str(tmp_path / "bad-eth0.json") in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [f"{'a' * 64}-eth0.json"]


def test_a_directory_that_was_never_written_has_no_entries(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "none").read() == ()
