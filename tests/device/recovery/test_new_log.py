"""New log: an acknowledgement proves that a data folder was restored from a copy, and a new log begins."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from outstation.device.recovery.catch_up import UNPROVEN_FROM
from outstation.device.recovery.findings import NEW_LOG, NewLogPlan
from outstation.device.recovery.new_log import plan_move
from outstation.device.recovery.open import open_store
from outstation.device.recovery.report_findings import report_findings
from outstation.device.store.message_log import MessageLog
from outstation.device.store.retention import AcknowledgedSeqs
from outstation.device.store.store import Store
from outstation.device.uplink.acknowledgements import Acknowledgements
from outstation.device.uplink.refusals import Refusals
from outstation.fleet.audit.audit import audit
from outstation.fleet.cli.disclosed import find_messages
from outstation.fleet.collector.acknowledger import Acknowledger
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.foundation import clock
from outstation.foundation.errors import StorageForked, StorageFull, UsageError
from outstation.protocol.transport.packets import IncomingMessage
from outstation.protocol.wire import commitment
from outstation.protocol.wire.commitment import Disclosure
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.verification import verify_message
from outstation.workbench.testing.messages import new_key
from scripts.kit.stores import KEY, STREAMS, TASKS, alarms, append, append_message, opened, outbox_payloads

NOW = "2026-11-24T22:20:00.000000Z"
COLLECTOR = new_key(9)
FIND_COLLECTOR = {COLLECTOR.public.kid: Signer("collector", COLLECTOR.public)}.get


class Collector:
    """A real collector's store and voice, without a broker between."""

    def __init__(self, folder: Path) -> None:
        self.store = FleetStore(folder / "fleet.db")
        self.store.enrol("pi-07", KEY.public, replace=False, now=NOW)
        self._voice = Acknowledger("acme", COLLECTOR)

    def take(self, store: Store, *, without: set[int] | None = None) -> list[str]:
        """Ingest the waiting messages except the seqs in `without`, and return the outcome of each."""
        waiting = [m for m in store.unacknowledged_messages(0, 10_000) if m.seq not in (without or set())]
        signer = Signer("pi-07", KEY.public)
        opened = [verify_message(m.topic, m.payload, (m.jws,), lambda _: signer) for m in waiting]
        return list(self.store.ingest([Arrival(message) for message in opened], [], NOW))

    def ack(self, log: str) -> IncomingMessage:
        sent = self._voice._sign(self.store.acknowledgement("pi-07", log))
        return IncomingMessage(sent.topic, sent.payload, (dict(sent.properties)["jws"],), True, 1, 1)


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    made = Collector(tmp_path)
    yield made
    made.store.close()


def obey(store: Store, author: MessageLog, delivery: IncomingMessage) -> None:
    acks = Acknowledgements(store, author, FIND_COLLECTOR, 1e6, Refusals(store, author))
    acks.receive(delivery, clock.read())
    acks.apply(clock.read(), force=True)


def consume(store: Store, author: MessageLog, upto: int, joined: bytes | None = None) -> None:
    """Write results of the task, 5 rows to a message; `joined`: bytes of the joined rows that all of them use."""
    while (store.cursor("judge") or 0) < upto:
        first = (store.cursor("judge") or 0) + 1
        body: dict[str, Any] = {
            "model": {"name": "m", "version": "1", "digest": "d"},
            "stream": "numbers",
            "rows": [first, first + 4],
            "n": 1,
            "input": "sha256:0",
            "columns": {"row": [first + 4], "t": [first], "label": ["low"], "score": [0.5]},
        }
        if joined is not None:
            # As a device: the commitment's key is derived from the log in which the message is first written.
            key = commitment.derive_joined_key(author.secret, author.log_id, "weather", (1, 3))
            proof = commitment.commit(key, [], [joined], [], {})
            body["joined"] = {"weather": {"stream": "weather", "rows": [1, 3], "input": proof}}
        with store.transaction() as tx:
            tx.advance_cursor("judge", first, first + 4)
            author.append(tx, "results", "judge", body, clock.read())


def copied(folder: Path, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)


def restored(tmp_path: Path, collector: Collector) -> tuple[Path, str]:
    """A folder as it was at message 6, when its device had written, and its collector has, 10."""
    live = tmp_path / "live"
    store, author = opened(live)
    append(store, "numbers", 100)
    consume(store, author, 30)
    collector.take(store)
    obey(store, author, collector.ack(author.log_id))
    store.close()
    copied(live, tmp_path / "image")
    store, author = opened(live)
    consume(store, author, 50)
    collector.take(store)
    obey(store, author, collector.ack(author.log_id))
    log = author.log_id
    store.close()
    copied(tmp_path / "image", live)
    return live, log


def test_an_acknowledgement_beyond_what_was_ever_written_begins_a_new_log(tmp_path: Path, collector: Collector) -> None:
    live, log = restored(tmp_path, collector)
    store, author = opened(live)
    assert author.log_id == log
    append(store, "numbers", 20)
    consume(store, author, 40)
    with pytest.raises(StorageForked, match="restored from an old copy"):
        obey(store, author, collector.ack(log))
    assert "acknowledgements refused" not in store.counters()
    store.close()
    store, author = opened(live)
    assert author.log_id != log
    assert set(collector.take(store)) == {"new"}
    obey(store, author, collector.ack(author.log_id))
    assert store.backlog().messages == 0
    consume(store, author, 60)
    collector.take(store)
    report = audit(collector.store)
    assert report.passed, report.to_dict()
    again = [
        row["rows"]
        for row in map(dict, [body for body in outbox_payloads(store).values() if body["kind"] == "results"])
    ]
    assert again == [[31, 35], [36, 40], [41, 45], [46, 50], [51, 55], [56, 60]]
    assert alarms(outbox_payloads(store))[0]["subject"] == "log"
    # The broker still has the acknowledgement of the old log: it is no attack.
    obey(store, author, collector.ack(log))
    assert "acknowledgements refused" not in store.counters()
    store.close()


@pytest.mark.parametrize("changed", ["", "reissued", "fresh"])
def test_the_audit_compares_joined_rows_of_one_log_after_a_restore(
    tmp_path: Path, collector: Collector, changed: str
) -> None:
    live, log = restored(tmp_path, collector)
    store, author = opened(live)
    append(store, "numbers", 20)
    consume(store, author, 35, b"air")
    consume(store, author, 40, b"other" if changed == "reissued" else b"air")
    with pytest.raises(StorageForked):
        obey(store, author, collector.ack(log))
    store.close()
    store, author = opened(live)
    assert author.log_id != log
    collector.take(store)
    obey(store, author, collector.ack(author.log_id))
    consume(store, author, 55, b"air")
    consume(store, author, 60, b"other" if changed == "fresh" else b"air")
    collector.take(store)
    report = audit(collector.store)
    assert [problem["reason"] for problem in report.invalid] == [
        "commits to rows 1-3 of weather as others than the results before it"
    ] * bool(changed), report.to_dict()
    store.close()


def test_a_fork_of_equal_length_is_detected_by_the_digest(tmp_path: Path, collector: Collector) -> None:
    live, log = restored(tmp_path, collector)
    for _ in range(2):
        # Two runs without a word from the collector.
        store, author = opened(live)
        consume(store, author, 30 + 5 * 4)
        for number in range(3):
            append_message(store, author, f"offline {number}")
        store.close()
    store, author = opened(live)
    with pytest.raises(StorageForked, match="another message 10"):
        obey(store, author, collector.ack(log))
    store.close()
    store, author = opened(live)
    assert set(collector.take(store)) == {"new"}
    texts = [body.get("summary", "") for body in outbox_payloads(store).values()]
    assert [text for text in texts if "offline" in text] == ["offline 0", "offline 1", "offline 2"] * 2
    assert audit(collector.store).passed
    store.close()


def test_what_is_missing_in_the_old_log_is_written_again_or_declared(tmp_path: Path, collector: Collector) -> None:
    live = tmp_path / "live"
    store, author = opened(live)
    for number in range(1, 7):
        append_message(store, author, f"message {number}")
    log = author.log_id
    collector.take(store, without={3, 4})
    obey(store, author, collector.ack(log))
    store.close()
    copied(live, tmp_path / "image")
    store, author = opened(live)
    for number in range(7, 11):
        append_message(store, author, f"message {number}")
    collector.take(store, without={3, 4, 8})
    store.close()
    copied(tmp_path / "image", live)
    store, author = opened(live)
    with pytest.raises(StorageForked):
        obey(store, author, collector.ack(log))
    store.close()
    store, author = opened(live)
    collector.take(store)
    bodies = outbox_payloads(store)
    assert [body["summary"] for body in bodies.values() if "reissued" in body] == ["message 3", "message 4"]
    report = audit(collector.store)
    assert report.passed, report.to_dict()
    assert [(gap["from"], gap["to"], gap["declared"]) for gap in report.gaps] == [(3, 4, True), (8, 8, True)]
    store.close()


def test_a_forged_acknowledgement_begins_no_new_log_and_is_counted(tmp_path: Path, collector: Collector) -> None:
    live, log = restored(tmp_path, collector)
    store, author = opened(live)
    real = collector.ack(log)
    forged = IncomingMessage(
        real.topic, real.payload.replace(b'"through":10', b'"through":99'), real.tokens, True, 1, 1
    )
    assert forged.payload != real.payload
    refusals = Refusals(store, author)
    acks = Acknowledgements(store, author, FIND_COLLECTOR, 1e6, refusals)
    assert acks.receive(forged, clock.read()) is None
    assert store.get_meta(NEW_LOG, "") == ""
    assert refusals._counts["acknowledgements refused"] == 1
    store.close()


def test_an_acknowledgement_of_our_own_history_changes_no_log(tmp_path: Path, collector: Collector) -> None:
    store, author = opened(tmp_path / "live")
    for number in range(1, 7):
        append_message(store, author, f"message {number}")
    collector.take(store, without={2, 6})
    delivery = collector.ack(author.log_id)
    assert b'"digest"' in delivery.payload
    for _ in range(2):
        obey(store, author, delivery)
        append_message(store, author, "more")
    collector.take(store)
    obey(store, author, collector.ack(author.log_id))
    assert store.backlog().messages == 0
    assert audit(collector.store).passed
    store.close()


def test_an_interrupted_new_log_is_finished_without_duplicates(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, log = restored(tmp_path, collector)
    store, author = opened(live)
    for number in range(70):
        append_message(store, author, f"offline {number}")
    with pytest.raises(StorageForked):
        obey(store, author, collector.ack(log))
    store.close()
    for left in (1, 2, 40):
        real, calls = MessageLog.reissue, [left]

        def dying(self: MessageLog, *arguments: Any, real: Any = real, calls: list[int] = calls) -> int:
            calls[0] -= 1
            if calls[0] < 0:
                raise KeyboardInterrupt
            return int(real(self, *arguments))

        with monkeypatch.context() as patch:
            patch.setattr(MessageLog, "reissue", dying)
            store = open_store(live)
            half = MessageLog("acme", "pi-07", KEY, store.log_id, store.boot, 120_000)
            with pytest.raises(KeyboardInterrupt):
                report_findings(store, half, TASKS, clock.read())
            store.close()
    store, author = opened(live)
    assert set(collector.take(store)) == {"new"}
    texts = [body["summary"] for body in outbox_payloads(store).values() if "offline" in body.get("summary", "")]
    assert texts == [f"offline {number}" for number in range(70)]
    assert sorted(outbox_payloads(store)) == list(range(1, len(outbox_payloads(store)) + 1))
    assert audit(collector.store).passed
    store.close()


def test_in_a_store_without_a_free_page_a_new_log_begins_all_the_same(tmp_path: Path) -> None:
    store, author = opened(tmp_path / "d", max_size=2 << 20)
    for size in (3000, 300, 10):
        with contextlib.suppress(StorageFull):
            while True:
                with store.transaction() as tx:
                    author.append(tx, "health", None, {"x": "y" * size}, clock.read())
    old, waiting = store.log_id, store.backlog().messages
    plan = NewLogPlan(reason="The store was restored from a copy.", old=old, through=10**6)
    with store.transaction(vital=True) as tx:
        tx.set_meta(NEW_LOG, msgspec.json.encode(plan).decode())
    store.close()
    store, author = opened(tmp_path / "d", max_size=2 << 20)
    assert store.log_id != old
    assert store.backlog().messages == waiting + 2
    store.close()


def test_an_acknowledgement_from_before_the_copy_proves_nothing(
    tmp_path: Path,
) -> None:
    for upto, late in ((30, "older than the copy"), (40, "as old as the copy")):
        live, image = tmp_path / f"live {upto}", tmp_path / f"image {upto}"
        (tmp_path / f"fleet {upto}").mkdir()
        own = Collector(tmp_path / f"fleet {upto}")
        store, author = opened(live)
        append(store, "numbers", 100)
        consume(store, author, 20)
        own.take(store)
        obey(store, author, own.ack(author.log_id))
        consume(store, author, upto)
        own.take(store)
        stale = own.ack(author.log_id)
        consume(store, author, 40)
        log = author.log_id
        store.close()
        copied(live, image)
        store, author = opened(live)
        consume(store, author, 50)
        own.take(store)
        store.close()
        copied(image, live)
        store, author = opened(live)
        for text in ("second life 1", "second life 2"):
            append_message(store, author, text)
        obey(store, author, stale)
        with pytest.raises(StorageForked):
            obey(store, author, own.ack(log))
        store.close()
        store, author = opened(live)
        texts = [body.get("summary", "") for body in outbox_payloads(store).values()]
        assert [text for text in texts if "second" in text] == ["second life 1", "second life 2"], late
        assert set(own.take(store)) == {"new"}
        assert audit(own.store).passed
        store.close()
        own.store.close()


def test_an_acknowledged_message_of_this_run_proves_the_history(tmp_path: Path, collector: Collector) -> None:
    store, author = opened(tmp_path / "live")
    append_message(store, author, "one")
    store.close()
    store, author = opened(tmp_path / "live")
    collector.take(store)
    obey(store, author, collector.ack(author.log_id))
    assert store.get_meta(UNPROVEN_FROM, "") == "1"
    append_message(store, author, "two")
    collector.take(store)
    obey(store, author, collector.ack(author.log_id))
    assert store.get_meta(UNPROVEN_FROM, "") == ""
    append_message(store, author, "three")
    store.close()
    store, author = opened(tmp_path / "live")
    assert store.get_meta(UNPROVEN_FROM, "") == "3"
    store.close()


def test_a_device_that_joins_a_fleet_brings_all_its_stored_messages(tmp_path: Path, collector: Collector) -> None:
    alone = tmp_path / "alone"
    with open_store(alone) as store:
        store.bind_device("home", "garden")
        store.declare_streams(STREAMS)
        author = MessageLog("home", "garden", new_key(3), store.log_id, store.boot, 120_000)
        append(store, "numbers", 100)
        consume(store, author, 50)
        with store.transaction() as tx:
            # A broker has confirmed them, no collector has them.
            tx.outbox.set_acknowledged(AcknowledgedSeqs(6))
        former = author.log_id
    with open_store(alone) as store:
        assert plan_move(store, "acme", "pi-07")
        assert not plan_move(store, "acme", "pi-07")
        with pytest.raises(UsageError, match="has begun a new log"):
            plan_move(store, "other", "pi-07")
    store, author = opened(alone)
    assert set(collector.take(store)) == {"new"}
    obey(store, author, collector.ack(author.log_id))
    assert store.backlog().messages == 0
    assert (store.last_row("numbers"), store.cursor("judge")) == (100, 50)
    payloads = outbox_payloads(store)
    assert [body["rows"] for body in payloads.values() if body["kind"] == "results"][-1] == [46, 50]
    assert {body["device"] for body in payloads.values()} == {"pi-07"}
    assert payloads[1]["reissued"] == {"log": former, "seq": 1}
    shown = Disclosure(device="pi-07", log=former, task="judge", rows=(46, 50), key="", fields=[], t=[], columns=[])
    evidence = list(collector.store.evidence("pi-07"))
    assert [body.rows for _, body in find_messages(shown, evidence)] == [(46, 50)]
    with pytest.raises(UsageError, match=f"--rows 46-50 --log {former}"):
        find_messages(replace(shown, log=author.log_id), evidence)
    assert alarms(payloads) == []
    report = audit(collector.store)
    assert report.passed, report.to_dict()
    store.close()
