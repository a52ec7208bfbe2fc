"""Watermark: a store detects lost commits; no number is assigned twice, and losses are declared."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.device.store import watermark
from outstation.device.store.store import Store
from outstation.device.store.watermark import Watermark, WatermarkState
from outstation.protocol.wire.log_chain import digest
from outstation.protocol.wire.messages import CommandPayload
from scripts.kit.stores import (
    alarms,
    append,
    append_message,
    declared_numbers,
    filled,
    opened,
    outbox_payloads,
    pulled,
    served,
)


def chain_holds(store: Store) -> bool:
    """Return True if each message names its stored predecessor."""
    bodies = outbox_payloads(store)
    payloads = {seq: store._fetch_all("SELECT payload FROM outbox WHERE seq = ?", seq)[0][0] for seq in bodies}
    return all(body["prev"] == digest(payloads[seq - 1]) for seq, body in bodies.items() if seq - 1 in payloads)


def command(identity: str) -> CommandPayload:
    times = {"issued": "2026-11-24T12:00:00Z", "expires": "2026-11-24T12:10:00Z"}
    return CommandPayload(v=1, device="pi-07", id=identity, name="pause", args={"task": "judge"}, counter=41, **times)


def test_an_old_copy_of_the_database_put_back_gives_no_number_twice(tmp_path: Path) -> None:
    store, author = filled(tmp_path / "live", chunks=10, messages=10, acknowledged=3)
    old = pulled(tmp_path / "live", tmp_path / "old", store, emptied=True)
    with store.transaction() as tx:
        assert tx.commands.claim("operator", command("one"), None)
    append(store, "numbers", 30)
    for number in range(5):
        append_message(store, author, f"after the copy {number}", (51 + number, 51 + number))
    last = store.get_meta("digest", "")
    store.close()
    shutil.copyfile(old / "outstation.db", tmp_path / "live/outstation.db")
    store, author = opened(tmp_path / "live")
    assert store.last_row("numbers") == 130
    assert store.cursor("judge") == 55
    with store.transaction() as tx:
        assert tx.commands.claim("operator", command("again"), None) is None
    new = {seq: body for seq, body in outbox_payloads(store).items() if seq > 15}
    assert min(new) == 16
    assert new[16]["prev"] == last
    assert declared_numbers(new, "seq") == set(range(11, 16))
    [alarm] = alarms(new)
    assert alarm["evidence"]["rows"] == {"numbers": [[101, 130]]}
    assert alarm["evidence"]["tasks"] == {"judge": [[51, 55]]}
    assert "went back in time" in alarm["summary"]
    assert chain_holds(store)
    append(store, "numbers", 10)
    assert served(store) == {n: n for n in [*range(1, 101), *range(131, 141)]}
    store.close()
    store, _ = opened(tmp_path / "live")
    assert len(alarms(outbox_payloads(store))) == 1
    store.close()


def test_lost_commits_are_declared_once_and_begin_a_new_boot_number(tmp_path: Path) -> None:
    store, author = filled(tmp_path / "live", chunks=5, messages=5, acknowledged=0)
    before = pulled(tmp_path / "live", tmp_path / "lost")
    append_message(store, author, "promised, but never on the disk")
    boot = store.boot
    shutil.copyfile(tmp_path / "live/watermark", before / "watermark")
    store.close()
    store, author = opened(before)
    assert declared_numbers(outbox_payloads(store), "seq") == {6}
    assert store.boot == boot + 1
    store.close()


def test_a_power_cut_that_loses_the_watermark_only_is_no_loss(tmp_path: Path) -> None:
    store, author = filled(tmp_path / "live", chunks=5, messages=5, acknowledged=0)
    early = (tmp_path / "live/watermark").read_bytes()
    append_message(store, author, "on the disk")
    cut = pulled(tmp_path / "live", tmp_path / "cut")
    store.close()
    for left in (early, early[:100], b"", None):
        case = tmp_path / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(cut, case)
        (case / "watermark").unlink()
        if left is not None:
            (case / "watermark").write_bytes(left)
        store, _ = opened(case)
        assert not alarms(outbox_payloads(store))
        assert store.log_id == author.log_id
        store.close()


def test_a_deleted_database_begins_a_new_log_and_rows_go_on(tmp_path: Path) -> None:
    store, author = filled(tmp_path, chunks=6, messages=4, acknowledged=0)
    old = author.log_id
    store.close()
    (tmp_path / "outstation.db").unlink()
    store, author = opened(tmp_path)
    assert author.log_id == store.log_id != old
    assert store.last_row("numbers") == 60
    assert store.cursor("judge") == 20
    first, second = outbox_payloads(store)[1], outbox_payloads(store)[2]
    assert (first["event"], first["prev"]) == ("new log", "")
    assert first["evidence"] == {"old": old, "through": 4, "reissued": 0}
    assert second["severity"] == "critical"
    assert old in second["summary"]
    append(store, "numbers", 10)
    assert served(store) == {n: n for n in range(61, 71)}
    store.close()
    store, author = opened(tmp_path)
    assert len(outbox_payloads(store)) == 2
    store.close()


def test_the_database_of_another_log_is_taken_over_with_a_log_of_its_own(tmp_path: Path) -> None:
    other, author = filled(tmp_path / "other", chunks=3, messages=6, acknowledged=2)
    foreign = author.log_id
    other.close()
    store, author = filled(tmp_path / "live", chunks=6, messages=4, acknowledged=0)
    mine = author.log_id
    store.close()
    shutil.copyfile(tmp_path / "other/outstation.db", tmp_path / "live/outstation.db")
    store, author = opened(tmp_path / "live")
    assert author.log_id not in (mine, foreign)
    assert store.last_row("numbers") == 60
    bodies = outbox_payloads(store)
    # Messages 1 and 2 were acknowledged; the others are written again.
    assert [bodies[seq]["reissued"]["seq"] for seq in range(1, 5)] == [3, 4, 5, 6]
    assert bodies[5]["event"] == "new log"
    assert chain_holds(store)
    assert len(store.unacknowledged_messages(0, 100)) == store.backlog().messages == 6
    store.close()


@given(st.integers(0, 2**63 - 1), st.binary(max_size=300), st.data())
def test_a_slot_that_is_not_whole_counts_for_nothing(number: int, body: bytes, data: st.DataObject) -> None:
    framed = watermark._frame(number, body)
    assert watermark._unframe(framed) == (number, body)
    assert watermark._unframe(framed + b"rest of an older one") == (number, body)
    at = data.draw(st.integers(0, len(framed) * 8 - 1))
    changed = bytearray(framed)
    changed[at // 8] ^= 1 << at % 8
    assert watermark._unframe(bytes(changed)) == (0, b"")
    assert watermark._unframe(framed[: at // 8]) == (0, b"")


def test_a_torn_write_leaves_the_one_before(tmp_path: Path) -> None:
    item = Watermark(tmp_path)
    for seq in range(1, 6):
        item.save(WatermarkState("log", seq, f"digest {seq}", 1, "acme/pi-07", {}, {}))
    item.close()
    data = bytearray((tmp_path / "watermark").read_bytes())
    newest = data.index(b"digest 5")
    data[newest] ^= 1
    (tmp_path / "watermark").write_bytes(data)
    mark = watermark.load(tmp_path)
    assert mark is not None
    assert mark.seq == 4


def test_a_watermark_that_cannot_be_written_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, author = filled(tmp_path, chunks=2, messages=2, acknowledged=0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        append_message(store, author, "committed all the same")
    store.close()
    store, _ = opened(tmp_path)
    assert outbox_payloads(store)[3]["summary"] == "committed all the same"
    assert not alarms(outbox_payloads(store))
    store.close()


def test_writing_the_watermark_costs_less_than_a_commit(tmp_path: Path) -> None:
    store, author = filled(tmp_path, chunks=2, messages=2, acknowledged=0)
    assert store._writer is not None
    watermark = store._writer.watermark
    assert watermark.state is not None
    began = time.perf_counter()
    for _ in range(200):
        watermark.save(watermark.state)
    each_us = (time.perf_counter() - began) / 200 * 1e6
    began = time.perf_counter()
    for number in range(20):
        append_message(store, author, f"message {number}")
    commit_us = (time.perf_counter() - began) / 20 * 1e6
    store.close()
    print(f"watermark {each_us:.1f} µs, commit {commit_us:.0f} µs, {os.path.getsize(tmp_path / 'watermark')} bytes")
    assert each_us < commit_us
