"""Collector with a real broker, a real database and hostile senders."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from outstation.fleet.audit.audit import audit
from outstation.fleet.collector import collector as collect
from outstation.fleet.collector import refusal_alarm
from outstation.fleet.collector.collector import Collector
from outstation.fleet.collector.quota import Quota
from outstation.fleet.config import FleetConfig
from outstation.fleet.database.store import FleetStore
from outstation.fleet.drift import polled_alerts
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.foundation import clock
from outstation.foundation.errors import LinkDown, StorageFull
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage, PublishReceipt
from outstation.protocol.wire import jws
from outstation.protocol.wire.keys import SigningKey, b64url_decode, b64url_encode
from outstation.protocol.wire.messages import AckPayload
from outstation.protocol.wire.runs import MAX_RESULTS
from outstation.protocol.wire.verification import verify_message
from outstation.workbench.testing.broker import MosquittoBroker
from outstation.workbench.testing.messages import FLEET, MessageSender, SignedMessage, new_key
from outstation.workbench.testing.patience import wait_until
from tests.kit.fleet_databases import sqlite_of

NOW = "2026-11-24T22:20:00.000000Z"
VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "messages.json"


@dataclass
class Wire:
    """A link that records the collector's calls and the state of the database at each."""

    store: FleetStore
    incoming: list[IncomingMessage | PublishReceipt] = field(default_factory=list)
    done: list[tuple[str, int]] = field(default_factory=list)
    sent: list[OutgoingMessage] = field(default_factory=list)
    window: int = 20

    def send(self, message: OutgoingMessage) -> int:
        self.sent.append(message)
        self.done.append(("ack", self.store.count_messages()))
        return len(self.sent)

    def receive(self, timeout_s: float) -> list[IncomingMessage | PublishReceipt]:
        events, self.incoming = self.incoming, []
        return events

    def acknowledge(self, delivery: IncomingMessage) -> None:
        self.done.append(("puback", self.store.count_messages()))

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass

    def acks(self) -> list[tuple[str, int, list[tuple[int, int]]]]:
        """Return (device, through, missing) of each acknowledgement."""
        bodies = [json.loads(message.payload) for message in self.sent]
        return [(body["device"], body["through"], [tuple(r) for r in body["missing"]]) for body in bodies]


@dataclass
class Desk:
    """A collector with its database and recording link."""

    collector: Collector
    store: FleetStore
    wire: Wire
    key: SigningKey

    def hand(self, *sent: SignedMessage | IncomingMessage) -> None:
        """Run one tick with these messages on the link."""
        self.wire.incoming += [item.to_incoming() if isinstance(item, SignedMessage) else item for item in sent]
        self.collector.tick(self.wire, 0.0)

    def reasons(self) -> dict[str, int]:
        return {row["reason"]: row["count"] for row in self.store.refusals()}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    store, key = FleetStore(tmp_path / "fleet.db"), new_key()
    wire = Wire(store)
    yield Desk(Collector(FLEET, BrokerConfig(), store, key), store, wire, key)
    store.close()


def enrolled(store: FleetStore, device: str = "pi-07") -> MessageSender:
    sender = MessageSender(device)
    store.enrol(device, sender.key.public, replace=False, now=NOW)
    return sender


def test_a_message_is_stored_before_puback_and_acknowledged_last(desk: Desk) -> None:
    sender = enrolled(desk.store)
    desk.hand(sender.results(), sender.results())
    assert desk.wire.done == [("puback", 2), ("puback", 2), ("ack", 2)]
    assert desk.wire.acks() == [("pi-07", 2, [])]


def test_an_acknowledgement_is_retained_signed_and_a_cloud_event(desk: Desk) -> None:
    sender = enrolled(desk.store)
    desk.hand(sender.results())
    [message] = desk.wire.sent
    properties = dict(message.properties)
    opened = verify_message(
        message.topic, message.payload, [properties["jws"]], lambda _: jws.Signer("c", desk.key.public)
    )
    assert isinstance(opened.body, AckPayload)
    assert opened.body.log == sender.log
    assert message.retain
    assert message.topic == "outstation/acme/pi-07/ack"
    assert (properties["specversion"], properties["type"]) == ("1.0", "outstation.ack.v1")
    assert properties["source"] == "outstation/acme/pi-07"


def test_gaps_are_requested_and_duplicates_are_acknowledged_again(desk: Desk) -> None:
    sender = enrolled(desk.store)
    log = [sender.results() for _ in range(6)]
    desk.hand(log[0], log[3], log[5])
    desk.hand(log[0])
    desk.hand(log[1], log[2], log[4])
    assert [ack[1:] for ack in desk.wire.acks()] == [(6, [(2, 3), (5, 5)]), (6, [(2, 3), (5, 5)]), (6, [])]
    assert desk.collector.stored_count == 6


def hostile(sender: MessageSender, stranger: MessageSender) -> dict[str, tuple[IncomingMessage, str]]:
    """Return name of the attack → delivery and expected reason of refusal."""
    good, foreign = sender.results(), stranger.results()
    delivery = good.to_incoming()
    top = "outstation/acme/pi-07/results/exercise"
    elsewhere = sender.sign_payload("outstation/other/pi-07/results/exercise", good.payload)
    return {
        "unsigned": (replace(delivery, tokens=()), "unsigned"),
        "signed twice": (replace(delivery, tokens=(good.jws, good.jws)), "several signatures"),
        "foreign key": (foreign.to_incoming(), "unknown key"),
        "another's topic": (replace(delivery, topic=top.replace("pi-07", "pi-08")), "other topic"),
        "signed for another's topic": (
            sender.sign_payload(top.replace("pi-07", "pi-08"), good.payload).to_incoming(),
            "other device",
        ),
        "another fleet": (elsewhere.to_incoming(), "other fleet"),
        "another kind": (sender.sign_payload("outstation/acme/pi-07/health", good.payload).to_incoming(), "other kind"),
        "another task": (
            sender.sign_payload(top.replace("exercise", "else"), good.payload).to_incoming(),
            "other task",
        ),
        "altered": (replace(delivery, payload=delivery.payload.replace(b"0.5", b"0.6", 1)), "bad signature"),
        "too large": (replace(delivery, payload=b" " * (1 << 20) + b"{}"), "too large"),
        "no topic": (replace(delivery, topic="\x00/\ud7ff"), "topic"),
        "no json": (sender.sign_payload(top, b"\xff\xfe{").to_incoming(), "malformed payload"),
        "deep json": (sender.sign_payload(top, b"[" * 100_000).to_incoming(), "malformed payload"),
        "no token": (replace(delivery, tokens=("\x00" * 5000,)), "malformed signature"),
        "a key twice": (sender.sign_payload(top, good.payload[:-1] + b',"seq":1}').to_incoming(), "duplicate key"),
        "ten megabytes": (replace(delivery, payload=bytes(10 << 20)), "too large"),
        "text that is none": (
            sender.sign_payload(top, good.payload[:-1] + b',"x":"\xff"}').to_incoming(),
            "malformed payload",
        ),
    }


@pytest.mark.attack("broker")
def test_every_attack_is_refused_with_its_reason_and_counted(desk: Desk) -> None:
    sender, stranger = enrolled(desk.store), MessageSender("pi-09")
    enrolled(desk.store, "pi-08")
    for name, (delivery, reason) in hostile(sender, stranger).items():
        before = desk.reasons().get(reason, 0)
        desk.hand(delivery)
        assert desk.reasons().get(reason, 0) == before + 1, name
    assert desk.store.count_messages() == 0
    assert desk.wire.sent == []
    assert len(desk.wire.done) == len(hostile(sender, stranger))


def test_a_well_signed_metric_that_is_no_text_does_not_stop_the_collector(desk: Desk) -> None:
    sender = enrolled(desk.store)
    broken = sender.quality().payload[:-1] + b',"note":"\xff"}'
    desk.hand(sender.sign_payload("outstation/acme/pi-07/quality/exercise", broken), sender.results())
    assert desk.reasons() == {"malformed payload": 1}
    assert desk.store.count_messages() == 1


@pytest.mark.attack("broker")
def test_a_forged_retained_acknowledgement_of_a_silent_device_is_counted_and_answered_with_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrolled(desk.store)
    monkeypatch.setattr(desk.collector, "_missing_devices", {"pi-07"})
    body = {"v": 1, "kind": "ack", "device": "pi-07", "log": MessageSender().log, "through": 9, "missing": []}
    payload = json.dumps({**body, "time": NOW}).encode()
    forged = MessageSender().sign_payload(f"outstation/{FLEET}/pi-07/ack", payload)
    desk.hand(forged.to_incoming(retained=True))
    assert desk.reasons() == {"unknown key": 1}
    assert desk.wire.acks() == []


def test_a_short_message_that_stands_for_67_mb_of_labels_is_refused_and_not_acknowledged(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    sender, run = enrolled(desk.store), [[1, 1, MAX_RESULTS]]
    columns = {"row": run, "t": run, "label": [["x" * 4096, MAX_RESULTS]]}
    bomb = sender.results(MAX_RESULTS, rows_at=(1, MAX_RESULTS), columns=columns)
    assert len(bomb.payload) < 6000
    desk.hand(bomb, sender.health())
    assert desk.reasons() == {"malformed payload": 1}
    assert "refused 1 messages, last malformed payload" in caplog.text
    assert desk.wire.acks() == [("pi-07", 2, [(1, 1)])]
    assert desk.store.count_messages() == 1


def test_a_flood_of_hostile_messages_loses_no_valid_one_and_alerts_once(desk: Desk) -> None:
    sender, stranger = enrolled(desk.store), MessageSender("pi-09")
    enrolled(desk.store, "pi-08")
    attacks = [d for name, (d, _) in hostile(sender, stranger).items() if name not in ("ten megabytes", "too large")]
    flood = [attacks[i % len(attacks)] for i in range(10_000)]
    good = [sender.results().to_incoming() for _ in range(1_000)]
    first_seq = sender.seq - len(good) + 1
    for i in range(0, 1_000, 40):
        desk.hand(*flood[i * 10 : i * 10 + 200], *good[i : i + 40], *flood[i * 10 + 200 : i * 10 + 400])
    assert desk.store.count_messages() == 1_000
    assert desk.store.acknowledgement("pi-07", sender.log).missing == [(1, first_seq - 1)]
    assert sum(desk.reasons().values()) == 10_000
    assert len(desk.wire.done) - len(desk.wire.sent) == 11_000
    raised = {alert["device"]: alert for alert in desk.store.alerts()}
    assert sorted(raised) == ["", "pi-07", "pi-08"]
    assert len(desk.store.alerts()) == 3
    assert (raised["pi-07"]["alert"], raised["pi-07"]["severity"]) == ("security", "critical")
    assert "messages in the name of pi-07 were refused within" in raised["pi-07"]["summary"]
    assert "in names that are not enrolled" in raised[""]["summary"]
    assert "table refusal_samples" in raised[""]["summary"]


def test_drift_of_most_devices_raises_an_alert_of_the_collector(
    desk: Desk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = clock.read().wall_us
    monkeypatch.setattr(polled_alerts, "POLL_INTERVAL_S", 0.0)
    senders = [enrolled(desk.store, f"pi-{i}") for i in range(6)]
    for sender in senders:
        for hour in range(100, 0, -1):
            begin, end = (clock.to_rfc3339(now - hours * 3_600_000_000) for hours in (hour, hour - 1))
            desk.hand(sender.drift(window={"index": 1, "rows": [1, 2], "from": begin, "to": end, "n": 2}))
    for number, sender in enumerate(senders[:5]):
        assert len([alert for alert in desk.store.alerts() if alert["device"] == ""]) == (number >= 3)
        desk.hand(sender.alert(time=clock.to_rfc3339(now - 1_000_000)))
    [alert] = [alert for alert in desk.store.alerts() if alert["device"] == ""]
    assert (alert["alert"], alert["severity"]) == ("drift", "warning")
    assert alert["summary"].startswith("exercise: ax has drifted on 3 of 6 devices since ")
    assert alert["summary"] in caplog.text


def test_a_few_refused_messages_raise_no_alert(desk: Desk) -> None:
    sender = enrolled(desk.store)
    desk.hand(*[replace(sender.results().to_incoming(), tokens=()) for _ in range(refusal_alarm.MAX_REFUSALS)])
    assert desk.store.alerts() == []
    desk.hand(replace(sender.results().to_incoming(), tokens=()))
    assert [alert["device"] for alert in desk.store.alerts()] == ["pi-07"]


def test_a_restarted_collector_does_not_repeat_the_alert_of_an_attack_that_goes_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = enrolled(desk.store)
    moment = replace(clock.read(), wall_us=1_764_022_680_000_000)
    monkeypatch.setattr(clock, "read", lambda: moment)
    attack = [replace(sender.results().to_incoming(), tokens=())] * 30
    desk.hand(*attack)
    desk.collector = Collector(FLEET, BrokerConfig(), desk.store, desk.key)
    desk.hand(*attack)
    assert len(desk.store.alerts()) == 1
    moment = replace(moment, wall_us=moment.wall_us + 3_600_000_000)
    desk.collector = Collector(FLEET, BrokerConfig(), desk.store, desk.key)
    desk.hand(*attack)
    assert [alert["open"] for alert in desk.store.alerts()] == [True]


@pytest.mark.parametrize("failing", ["ingest", "acknowledgements"])
def test_a_batch_that_is_stored_at_the_third_try_costs_its_quota_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    sender = enrolled(desk.store)
    quota = Quota(messages_per_s=0.001, burst_s=10_000.0)
    desk.collector = Collector(FLEET, BrokerConfig(), desk.store, desk.key, quota=quota)
    log = [sender.results() for _ in range(10)]
    forged = replace(log[0].to_incoming(), tokens=())

    def full(*_: object) -> None:
        raise StorageFull("the disk is full")

    with monkeypatch.context() as while_full:
        while_full.setattr(desk.store, failing, full)
        desk.hand(*log[:6], forged)
        for _ in range(2):
            desk.collector._retry_at = 0.0
            desk.hand()
    desk.collector._retry_at = 0.0
    desk.hand()
    desk.hand(*log[6:])
    assert desk.reasons().get("over quota", 0) == 0
    assert desk.store.count_messages() == 10
    # The forged message was refunded once, so the bucket is empty now.
    desk.hand(sender.results())
    assert desk.reasons()["over quota"] == 1


def test_an_alert_that_cannot_be_stored_now_is_stored_later(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = enrolled(desk.store)
    attack = [replace(sender.results().to_incoming(), tokens=())] * 30

    def full(row: object) -> None:
        raise StorageFull("the disk is full")

    with monkeypatch.context() as while_full:
        while_full.setattr(desk.store, "raise_alert", full)
        desk.hand(*attack)
    assert desk.store.alerts() == []
    desk.hand(sender.results())
    assert len(desk.store.alerts()) == 1


def test_an_enrolled_key_that_cannot_be_used_keeps_no_other_device_out(desk: Desk) -> None:
    sender = enrolled(desk.store)
    with desk.store.transaction() as db:
        db.execute(
            "INSERT INTO keys (kid, device, key, added) VALUES ('kid', 'pi-08', ?, 'now')", (b64url_encode(bytes(32)),)
        )
        db.execute("UPDATE meta SET value = value + 1")
    desk.hand(sender.results())
    assert desk.store.count_messages() == 1


def test_a_message_that_cannot_be_stored_does_not_hold_up_its_neighbours(desk: Desk) -> None:
    sender = enrolled(desk.store)
    columns = {"row": [201], "t": [2**70], "label": ["PEN"], "score": [0.5]}
    log = [sender.results(n=2), sender.results(n=1, columns=columns), sender.results()]
    desk.hand(*log)
    assert desk.store.count_messages() == 2
    assert desk.wire.acks() == [("pi-07", 3, [(2, 2)])]
    assert sum(desk.reasons().values()) == 1


def test_a_revoked_key_signs_nothing_and_old_messages_stay_acknowledged(desk: Desk) -> None:
    sender = enrolled(desk.store)
    old, late = sender.results(), sender.results()
    desk.hand(old)
    desk.store.enrol("pi-07", new_key().public, replace=True, now=NOW)
    desk.hand(old, late)
    assert desk.reasons() == {"revoked key": 1}
    assert desk.wire.acks() == [("pi-07", 1, []), ("pi-07", 1, [])]
    assert audit(desk.store).passed


def test_a_device_enrolled_by_another_process_meanwhile_is_known(desk: Desk) -> None:
    sender = MessageSender()
    desk.hand(sender.results())
    other = FleetStore(desk.store.path)
    other.enrol("pi-07", sender.key.public, replace=False, now=NOW)
    other.close()
    desk.hand(sender.results())
    assert desk.reasons() == {"unknown key": 1}
    assert desk.wire.acks() == [("pi-07", 2, [(1, 1)])]


def test_a_flood_of_unknown_keys_reads_no_key_from_the_database(desk: Desk) -> None:
    desk.hand(MessageSender("pi-0").results())
    reads: list[str] = []
    sqlite_of(desk.store).connection.set_trace_callback(lambda sql: reads.append(sql) if "FROM keys" in sql else None)
    strangers = [MessageSender(f"pi-{i}").results() for i in range(100)]
    for item in strangers:
        desk.hand(item)
    assert reads == []
    assert desk.reasons() == {"unknown key": 101}


def test_state_is_stored_and_a_retained_message_is_no_sign_of_life(desk: Desk) -> None:
    sender = enrolled(desk.store)
    desk.hand(sender.state("offline").to_incoming(retained=True))
    [device] = desk.store.devices()
    assert (device["state"], device["last_seen"]) == ("offline", None)
    desk.hand(sender.state("online"))
    [device] = desk.store.devices()
    assert device["state"] == "online"
    assert device["last_seen"] is not None
    assert desk.wire.sent == []


def test_a_failing_database_acknowledges_nothing_and_loses_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = enrolled(desk.store)
    sqlite_of(desk.store).connection.execute("PRAGMA busy_timeout = 10")
    blocker = sqlite3.connect(desk.store.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    desk.hand(sender.results(), sender.results())
    assert desk.wire.done == []
    blocker.execute("ROLLBACK")
    blocker.close()
    desk.hand(sender.results())
    assert desk.wire.done == []
    monkeypatch.setattr(desk.collector, "_retry_at", 0.0)
    desk.hand()
    assert desk.wire.done == [("puback", 3)] * 3 + [("ack", 3)]


def test_a_database_that_fails_for_long_leaves_the_messages_to_the_broker(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "MAX_HELD", 3)
    monkeypatch.setattr(desk.collector, "_retry_at", time.monotonic() + 60)
    sender = enrolled(desk.store)
    with pytest.raises(LinkDown, match="database"):
        desk.hand(*[sender.results() for _ in range(4)])
    assert desk.wire.done == []


def test_acknowledgements_stay_within_the_window_and_the_newest_wins(desk: Desk) -> None:
    senders = [enrolled(desk.store, f"pi-{i}") for i in range(5)]
    desk.wire.window = 2
    desk.hand(*[sender.results() for sender in senders])
    assert len(desk.wire.sent) == 2
    desk.hand(senders[4].results())
    desk.hand(*[PublishReceipt(token, 0, "Success") for token in (1, 2)])  # type: ignore[arg-type]
    desk.hand(*[PublishReceipt(token, 0, "Success") for token in (3, 4)])  # type: ignore[arg-type]
    assert desk.wire.acks() == [(f"pi-{i}", 1 if i < 4 else 2, []) for i in range(5)]


@pytest.mark.skipif(not VECTORS.exists(), reason="the shared message vectors are not beside this repository")
def test_the_shared_vectors_are_accepted_and_refused_as_expected(desk: Desk) -> None:
    vectors = json.loads(VECTORS.read_text(encoding="utf-8"))
    key = key_of(vectors["jwk"])
    desk.store.enrol(vectors["device"], key.public, replace=False, now=NOW)
    accepted = [v for v in vectors["accept"] if not v["topic"].endswith("/ack")]
    for vector in vectors["reject"]:
        desk.hand(vector_delivery(vector))
    assert desk.store.count_messages() == 0
    assert sum(desk.reasons().values()) == len(vectors["reject"])
    desk.hand(*[vector_delivery(vector) for vector in accepted])
    assert desk.store.count_messages() == sum('"seq"' in v["payload"] for v in accepted)
    assert sum(desk.reasons().values()) == len(vectors["reject"])


def key_of(jwk: dict[str, str]) -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(b64url_decode(jwk["d"])))


def vector_delivery(vector: dict[str, Any]) -> IncomingMessage:
    tokens = vector["jws"] if isinstance(vector["jws"], list) else [vector["jws"]]
    return IncomingMessage(
        vector["topic"], vector["payload"].encode(), tuple(t for t in tokens if t is not None), False, 1, 1
    )


# --- with a real broker ---


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[MosquittoBroker]:
    with MosquittoBroker(tmp_path, persistence=True) as running:
        yield running


def publish(link: Link, messages: list[OutgoingMessage], received: list[IncomingMessage | PublishReceipt]) -> None:
    """Send all, a window at a time, and wait until the broker has them; what came meanwhile is added to `heard`."""
    waiting, under_way = list(messages), set[int]()
    deadline = time.monotonic() + 60
    while waiting or under_way:
        while waiting and len(under_way) < min(20, link.window):
            under_way.add(link.send(waiting.pop(0)))
        events = link.receive(0.1)
        under_way -= {event.token for event in events if isinstance(event, PublishReceipt)}
        received += [event for event in events if isinstance(event, IncomingMessage)]
        assert time.monotonic() < deadline, "the broker does not take the messages"


def test_a_collector_started_before_its_broker_waits_and_then_collects(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = MosquittoBroker(tmp_path)
    store = FleetStore(tmp_path / "fleet.db")
    sender = enrolled(store)
    collector = Collector(FLEET, BrokerConfig(url=broker.url), store, new_key())
    done = threading.Event()

    def count_attempts() -> int:
        return sum("trying again" in record.message for record in caplog.records)

    def play() -> None:
        wait_until("the first attempt", lambda: count_attempts() == 1)
        with broker:
            link = Link(BrokerConfig(url=broker.url), "pi-07")
            wait_until("a connection", lambda: collector._link is not None)
            publish(link, [sender.results().to_outgoing()], [])
            wait_until("the message is stored", lambda: collector.stored_count == 1)
            link.close()
            collector.stop()
            done.wait(60)

    thread = threading.Thread(target=play)
    thread.start()
    collector.run()
    done.set()
    thread.join()
    assert store.count_messages() == 1
    store.close()
    assert count_attempts() == 1


COLLECT = [sys.executable, "-c", "from outstation.fleet.cli.group import fleet; fleet()", "collect", "--dir"]


def collecting(folder: Path) -> subprocess.Popen[bytes]:
    """Start the real process; its log is appended to collector.log."""
    with (folder / "collector.log").open("ab") as out:
        return subprocess.Popen([*COLLECT, str(folder / "acme")], stderr=out, stdout=out)


def stored(config: FleetConfig) -> int:
    """Return the number of stored messages, as another process sees it."""
    store = FleetStore(Path(config.fleet.db), read_only=True)
    count = store.count_messages()
    store.close()
    return count


def test_killed_three_times_in_the_stream_every_message_is_stored_once(tmp_path: Path, broker: MosquittoBroker) -> None:
    config = init_fleet(tmp_path / "acme", FLEET, BrokerConfig(url=broker.url))
    store = FleetStore(Path(config.fleet.db))
    sender = enrolled(store)
    store.close()
    log = [sender.results() for _ in range(300)] + [sender.health_with_cursor()]
    stop = threading.Event()

    def play() -> None:
        """Send unacknowledged messages until the collector has all, as a device does."""
        link = Link(BrokerConfig(url=broker.url), "pi-07", subscribe=[f"outstation/{FLEET}/pi-07/ack"])
        safe: set[int] = set()
        while not stop.is_set() and len(safe) < len(log):
            publish(link, [item.to_outgoing() for item in log if item.seq not in safe][:20], received := [])
            received += link.receive(0.3)
            for event in received:
                if isinstance(event, IncomingMessage):
                    link.acknowledge(event)
                    ack = json.loads(event.payload)
                    holes = {seq for a, b in ack["missing"] for seq in range(a, b + 1)}
                    safe |= set(range(1, ack["through"] + 1)) - holes
        link.close()

    device = threading.Thread(target=play)
    device.start()
    killed_at = [0]
    try:
        for _ in range(3):
            process = collecting(tmp_path)
            wait_until("more is stored", lambda: stored(config) > killed_at[-1] + 20)
            os.kill(process.pid, signal.SIGKILL)
            process.wait(60)
            killed_at.append(stored(config))
        process = collecting(tmp_path)
        wait_until(f"all is stored; see {tmp_path}/collector.log", lambda: not device.is_alive())
    finally:
        stop.set()
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        device.join(60)
    assert code == 0
    assert killed_at == sorted(set(killed_at)), "some kill was not in the stream"
    assert killed_at[-1] < len(log), "some kill was not in the stream"
    read = FleetStore(Path(config.fleet.db), read_only=True)
    report = audit(read)
    assert report.passed, report.to_dict()
    assert (report.messages, report.gaps) == (301, [])
    assert read.acknowledgement("pi-07", sender.log).missing == []
    read.close()
