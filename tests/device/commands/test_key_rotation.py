"""Key rotation: after a crash at any step the log goes on and every message verifies."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from outstation.device.capacity.eviction import quarantine_damaged
from outstation.device.capacity.space import SpaceManager
from outstation.device.commands.executor import CommandExecutor
from outstation.device.commands.key_rotation import KeyRotation
from outstation.device.commands.receiver import CommandReceiver
from outstation.device.config.config import Config
from outstation.device.config.device import DeviceConfig as DeviceSection
from outstation.device.machine import keys as keyfiles
from outstation.device.machine.keys import KeyFiles, open_keys
from outstation.device.recovery import findings, new_log
from outstation.device.recovery.open import open_store
from outstation.device.store.message_log import MessageLog
from outstation.device.store.retention import AcknowledgedSeqs
from outstation.fleet.audit.audit import audit
from outstation.fleet.collector.collector import Collector
from outstation.fleet.database.store import FleetStore
from outstation.foundation import durable_files
from outstation.foundation.errors import UsageError
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.packets import IncomingMessage
from outstation.protocol.wire import jws, keys
from outstation.protocol.wire import key_rotation as wire
from outstation.protocol.wire.keys import SigningKey, b64url_encode
from outstation.protocol.wire.verification import verify_message
from outstation.workbench.testing.messages import MessageSender, SignedMessage, new_key
from tests.kit.operators import DEVICE, FLEET, NOW, Operator, trusted_keys

TIME = "2026-11-24T22:18:01.000000Z"


class Device:
    """Device in this process, which tests close and reopen as after a crash."""

    def __init__(self, folder: Path, given: SigningKey) -> None:
        self.folder, self.given, self.operator = folder, given, Operator()
        self.renewed = 0
        self.open()

    def open(self) -> None:
        self.store = open_store(self.folder)
        self.files = KeyFiles(self.folder, self.given)
        key, live = open_keys(self.store, self.files)
        self.author = MessageLog(FLEET, DEVICE, key, self.store.log_id, self.store.boot, 120_000, live)
        self.commands = CommandReceiver(
            self.store, self.author, trusted_keys(self.store, self.author, self.operator.key)
        )
        self.rotation = KeyRotation(self.store, self.author, self.files, self.commands.post, self._renew)
        self.control = CommandExecutor(self.store, self.author, self.commands, {"rotate-key": self.rotation.rotate}, {})
        self.control.recover(NOW)

    def crash(self) -> None:
        self.store.close()
        self.open()

    def rotate(self) -> bool:
        """Rotate the key; return True if the reply says so."""
        self.commands.accept(self.operator.command("rotate-key"))
        self.control.tick(NOW)
        with self.store.transaction() as tx:
            return tx.commands.unsent(0)[-1].ok

    def write(self, n: int = 1) -> None:
        with self.store.transaction() as tx:
            for _ in range(n):
                self.author.append(tx, "health", None, {}, NOW)

    def messages(self) -> list[IncomingMessage]:
        return [
            IncomingMessage(m.topic, m.payload, (m.jws,), False, 1, 1)
            for m in self.store.unacknowledged_messages(0, 1000)
        ]

    def acknowledged(self) -> None:
        """The collector has everything."""
        with self.store.transaction() as tx:
            tx.outbox.set_acknowledged(tx.outbox.acknowledged.union([(1, tx.log_head()[0])]))
        self.rotation.tick(NOW)

    def _renew(self) -> None:
        self.renewed += 1


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path / "device", new_key(1))
    yield made
    made.store.close()


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    store = FleetStore(tmp_path / "fleet.db")
    store.enrol(DEVICE, new_key(1).public, replace=False, now=TIME)
    yield Collector(FLEET, BrokerConfig(), store, new_key(2))
    store.close()


def stored(collector: Collector) -> int:
    return collector.store.count_messages()


def refusals(collector: Collector) -> dict[str, int]:
    return {row["reason"]: row["count"] for row in collector.store.refusals()}


def security_alerts(collector: Collector) -> list[str]:
    return [row["summary"] for row in collector.store.alerts() if row["alert"] == "security"]


def kid_of(delivery: IncomingMessage) -> str:
    return jws.claimed_kid(delivery.tokens[0])


def test_after_a_rotation_everything_verifies_in_one_batch(device: Device, collector: Collector) -> None:
    device.write(3)
    assert device.rotate()
    device.write(3)
    sent = device.messages()
    assert len({kid_of(message) for message in sent}) == 2
    collector._store(sent)
    assert (stored(collector), refusals(collector)) == (len(sent), {})
    report = audit(collector.store)
    assert (report.passed, report.messages) == (True, len(sent))
    assert collector.store.active_key(DEVICE) is not None
    assert collector.store.active_key(DEVICE).kid == device.author.key.public.kid  # type: ignore[union-attr]


def test_a_backlog_that_comes_after_the_rotation_is_still_taken(device: Device, collector: Collector) -> None:
    device.write(5)
    device.rotate()
    device.write(2)
    sent = device.messages()
    rotated = next(i for i, entry in enumerate(sent) if b'"key rotated"' in entry.payload)
    collector._store(sent[rotated:])
    collector._store(sent[:rotated])
    assert (stored(collector), refusals(collector)) == (len(sent), {})
    assert audit(collector.store).passed


def test_messages_of_the_new_key_are_refused_until_the_rotation_arrives(device: Device, collector: Collector) -> None:
    device.rotate()
    device.write(2)
    sent = device.messages()
    rotated = next(i for i, entry in enumerate(sent) if b'"key rotated"' in entry.payload)
    collector._store(sent[rotated + 1 :])
    assert stored(collector) == 0
    collector._store([*sent[rotated + 1 :], *sent[: rotated + 1]])
    assert stored(collector) == len(sent)
    assert audit(collector.store).passed


def test_a_rotation_that_comes_twice_changes_nothing_the_second_time(device: Device, collector: Collector) -> None:
    device.rotate()
    sent = device.messages()
    collector._store(sent)
    before = collector.store.enrolled_keys(), collector.store.keys_version()
    collector._store(sent)
    assert (collector.store.enrolled_keys(), collector.store.keys_version()) == before
    assert security_alerts(collector) == []


def test_a_second_rotation_waits_for_the_first_to_be_acknowledged(device: Device, collector: Collector) -> None:
    assert device.rotate()
    assert not device.rotate()
    collector._store(device.messages())
    device.acknowledged()
    assert device.renewed == 1
    assert device.rotate()
    device.write()
    collector._store(device.messages())
    assert refusals(collector) == {}
    report = audit(collector.store)
    assert report.passed, report.to_dict()
    assert len(collector.store.enrolled_keys()) == 3


def test_two_rotations_in_one_batch_verify(collector: Collector) -> None:
    sender = MessageSender(key=new_key(1))
    sent = [sender.health()]
    for seed in (11, 12):
        sent += [rotate(sender, new_key(seed)), sender.health()]
    collector._store([entry.to_incoming() for entry in reversed(sent)])
    assert (stored(collector), refusals(collector)) == (5, {})
    assert audit(collector.store).passed


def test_the_old_key_signs_nothing_after_the_rotation(device: Device, collector: Collector) -> None:
    device.write()
    device.rotate()
    collector._store(device.messages())
    thief = MessageSender(key=new_key(1), log=device.store.log_id, seq=50)
    collector._store([thief.health().to_incoming(), live_state(new_key(1))])
    assert refusals(collector) == {"retired key": 2}


def test_the_old_key_cannot_start_another_log_after_the_rotation(device: Device, collector: Collector) -> None:
    device.rotate()
    collector._store(device.messages())
    collector._store([MessageSender(key=new_key(1)).health().to_incoming()])
    assert refusals(collector) == {"retired key": 1}


def test_messages_of_the_old_key_in_an_earlier_log_stay_valid(device: Device, collector: Collector) -> None:
    collector._store([MessageSender(key=new_key(1)).health().to_incoming()])
    device.rotate()
    collector._store(device.messages())
    assert audit(collector.store).passed


def test_the_audit_reports_a_message_of_the_old_key_after_the_rotation(device: Device, collector: Collector) -> None:
    device.rotate()
    sent = device.messages()
    last = len(sent)
    forged = MessageSender(key=new_key(1), log=device.store.log_id, seq=last).health()
    collector._store([forged.to_incoming()])
    collector._store(sent)
    report = audit(collector.store)
    assert [(entry["seq"], entry["reason"][:28]) for entry in report.invalid] == [
        (last + 1, "does not verify: retired key")
    ]


def test_in_one_batch_with_the_rotation_such_a_message_is_refused(device: Device, collector: Collector) -> None:
    device.rotate()
    sent = device.messages()
    forged = MessageSender(key=new_key(1), log=device.store.log_id, seq=len(sent)).health()
    collector._store([forged.to_incoming(), *sent])
    assert refusals(collector) == {"retired key": 1}


def rotate(sender: MessageSender, new: SigningKey, **changes: Any) -> SignedMessage:
    """Return a rotation message of `sender`, which then uses the new key; `changes` alter the evidence."""
    old = sender.key.public
    made = wire.build_evidence(FLEET, sender.device, sender.log, sender.seq + 1, old, new)
    sent = sender.append("audit", event=wire.ROTATION_EVENT, summary="", evidence={**made, **changes})
    sender.key = new
    return sent


def live_state(key: SigningKey) -> IncomingMessage:
    topic = f"outstation/{FLEET}/{DEVICE}/state"
    payload = msgspec.json.encode(
        {"v": 1, "kind": "state", "device": DEVICE, "state": "stopped", "boot": 1, "time": TIME}
    )
    return IncomingMessage(topic, payload, (jws.sign(key, topic, payload),), False, 1, 1)


def proof_of(device: str, log: str, seq: int, old: SigningKey, new: SigningKey) -> str:
    return str(wire.build_evidence(FLEET, device, log, seq, old.public, new)["proof"])


LOG = "7e57ab1e-0000-4000-8000-000000000000"


@pytest.mark.parametrize(
    "changes",
    [
        {"proof": ""},
        {"proof": b64url_encode(bytes(64))},
        {"proof": proof_of("pi-08", LOG, 1, new_key(1), new_key(11))},
        {"proof": proof_of(DEVICE, LOG, 2, new_key(1), new_key(11))},
        {"proof": proof_of(DEVICE, LOG.replace("7e57", "0000"), 1, new_key(1), new_key(11))},
        {"proof": proof_of(DEVICE, LOG, 1, new_key(1), new_key(12))},
        {"key": new_key(12).public.text},
        {"key": "AAAA"},
        {"key": b64url_encode(bytes(32))},
        {"key": None, "proof": None, "old": None},
        {"old": new_key(2).public.kid},
    ],
    ids=["none", "zeros", "device", "seq", "log", "other key", "swapped", "short", "small order", "nulls", "other old"],
)
def test_a_rotation_without_proof_changes_no_key_and_raises_an_alert(
    collector: Collector, changes: dict[str, Any]
) -> None:
    sender = MessageSender(key=new_key(1), log=LOG)
    before = collector.store.enrolled_keys()
    collector._store([rotate(sender, new_key(11), **changes).to_incoming()])
    assert collector.store.enrolled_keys() == before
    [alert] = security_alerts(collector)
    assert "nothing changed" in alert
    collector._store([sender.health().to_incoming()])
    assert refusals(collector) == {"unknown key": 1}


def test_a_rotation_to_a_key_that_another_device_has_changes_nothing(collector: Collector) -> None:
    collector.store.enrol("pi-08", new_key(11).public, replace=False, now=TIME)
    collector._store([rotate(MessageSender(key=new_key(1)), new_key(11)).to_incoming()])
    assert [(kid, device) for kid, device, *_ in collector.store.enrolled_keys() if kid == new_key(11).public.kid] == [
        (new_key(11).public.kid, "pi-08")
    ]
    assert len(security_alerts(collector)) == 1


def test_another_devices_rotation_replayed_on_this_topic_is_refused(collector: Collector) -> None:
    collector.store.enrol("pi-08", new_key(5).public, replace=False, now=TIME)
    sent = rotate(MessageSender(device="pi-08", key=new_key(5)), new_key(11)).to_incoming()
    collector._store([IncomingMessage(sent.topic.replace("pi-08", DEVICE), sent.payload, sent.tokens, False, 1, 1)])
    assert refusals(collector) == {"other topic": 1}


def test_a_rotation_signed_by_a_revoked_key_changes_nothing(collector: Collector) -> None:
    collector.store.revoke(DEVICE, None, TIME)
    collector._store([rotate(MessageSender(key=new_key(1)), new_key(11)).to_incoming()])
    assert refusals(collector) == {"revoked key": 1}
    assert len(collector.store.enrolled_keys()) == 1


def test_a_rotation_learned_from_a_batch_that_was_not_stored_is_forgotten(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = MessageSender(key=new_key(1))
    sent = [rotate(sender, new_key(11)).to_incoming(), sender.health().to_incoming()]
    arrivals, refused = collector.verify(sent)
    assert (len(arrivals), refused) == (2, [])
    arrivals, refused = collector.verify(sent[1:])
    assert (arrivals, [refusal.reason for refusal in refused]) == ([], ["unknown key"])


# --- crashes ---


class Crash(BaseException):
    pass


def dies(*_: object, **__: object) -> None:
    raise Crash


def die_in_prepare(device: Device, patched: pytest.MonkeyPatch) -> None:
    patched.setattr(durable_files, "fsync", dies)


def die_before_the_commit(device: Device, patched: pytest.MonkeyPatch) -> None:
    patched.setattr(KeyRotation, "_commit", dies)


def die_after_the_commit(device: Device, patched: pytest.MonkeyPatch) -> None:
    patched.setattr(KeyRotation, "_activate", dies)


def die_before_the_first_rename(device: Device, patched: pytest.MonkeyPatch) -> None:
    patched.setattr(KeyFiles, "promote", dies)


def die_between_the_renames(device: Device, patched: pytest.MonkeyPatch) -> None:
    calls = []
    rename = os.replace

    def once(source: Path, target: Path) -> None:
        calls.append(target)
        rename(source, target)
        if len(calls) == 1:
            raise Crash

    patched.setattr(os, "replace", once)


STEPS = [
    die_in_prepare,
    die_before_the_commit,
    die_after_the_commit,
    die_before_the_first_rename,
    die_between_the_renames,
]


@pytest.mark.parametrize("second", [False, True], ids=["first rotation", "second rotation"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_the_next_start_has_the_key_that_the_log_says(
    device: Device,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    step: Callable[[Device, pytest.MonkeyPatch], None],
    second: bool,
) -> None:
    if second:
        device.rotate()
        collector._store(device.messages())
        device.acknowledged()
    device.write(2)
    with monkeypatch.context() as patched:
        step(device, patched)
        with pytest.raises(Crash):
            device.rotate()
    device.crash()
    device.write(2)
    sent = device.messages()
    collector._store(sent)
    assert refusals(collector) == {}
    assert audit(collector.store).passed
    active = collector.store.active_key(DEVICE)
    assert active is not None
    assert active.kid == device.author.key.public.kid
    device.acknowledged()
    assert device.rotate(), "and it can be rotated again"
    device.write()
    collector._store(device.messages())
    assert refusals(collector) == {}
    assert audit(collector.store).passed


def test_live_messages_keep_the_old_key_until_the_rotation_is_acknowledged(
    device: Device,
) -> None:
    old = device.author.key.public.kid
    device.rotate()
    for _ in range(2):
        keys_message = keyfiles.keys_message(device.author, NOW)
        assert jws.claimed_kid(dict(keys_message.properties)["jws"]) == old
        assert json.loads(keys_message.payload)["keys"][0]["kid"] == device.author.key.public.kid != old
        device.crash()
    device.acknowledged()
    after = keyfiles.keys_message(device.author, NOW)
    assert jws.claimed_kid(dict(after.properties)["jws"]) == device.author.key.public.kid
    device.crash()
    assert device.author.live_key is None


def test_a_pending_rotation_is_reissued_in_a_new_log(device: Device, collector: Collector) -> None:
    device.write(2)
    device.rotate()
    device.write(2)
    old = device.store.log_id
    plan = findings.NewLogPlan(
        reason="The store went back in time.", old=old, acknowledged=AcknowledgedSeqs().to_json()
    )
    with device.store.transaction() as tx:
        tx.set_meta(findings.NEW_LOG, msgspec.json.encode(plan).decode())
    new_log.start_new_log(device.store, device.author, NOW)
    assert device.author.log_id != old
    device.crash()
    collector._store(device.messages())
    assert refusals(collector) == {}
    assert audit(collector.store).passed
    assert collector.store.active_key(DEVICE).kid == device.author.key.public.kid  # type: ignore[union-attr]
    device.acknowledged()
    assert device.author.live_key is None


def spoil(device: Device, seq: int) -> None:
    """Change a byte of a stored message."""
    with device.store.transaction():
        spoiled = "CAST(substr(payload, 1, 100) || '~' || substr(payload, 102) AS BLOB)"
        device.store._db.execute(f"UPDATE outbox SET payload = {spoiled} WHERE seq = ?", (seq,))
    assert [message.seq for message in device.store.unacknowledged_messages(0, 1000) if not message.intact] == [seq]


def pending_seq(device: Device) -> int:
    return int(json.loads(device.store.get_meta(keyfiles.PENDING_ROTATION, ""))["seq"])


@pytest.mark.parametrize("arrived", [False, True], ids=["not sent before", "sent before"])
@pytest.mark.parametrize("second", [False, True], ids=["first rotation", "second rotation"])
def test_a_rotation_damaged_before_delivery_is_reissued_by_the_old_key(
    device: Device, collector: Collector, second: bool, arrived: bool
) -> None:
    if second:
        device.rotate()
        collector._store(device.messages())
        device.acknowledged()
    device.write(2)
    device.rotate()
    if arrived:
        collector._store(device.messages())
    spoil(device, lost := pending_seq(device))
    quarantine_damaged(device.store, device.author, [lost], NOW)
    device.crash()
    for _ in range(2):
        device.rotation.tick(NOW)
    assert pending_seq(device) > lost
    device.write(2)
    collector._store(device.messages())
    collector._store(device.messages())
    assert refusals(collector) == {}
    assert security_alerts(collector) == []
    acknowledgement = collector.store.acknowledgement(DEVICE, device.store.log_id)
    assert (acknowledgement.through, acknowledgement.missing) == (int(device.store.get_meta("seq", "")), [])
    assert audit(collector.store).passed
    device.acknowledged()
    assert device.store.get_meta(keyfiles.PENDING_ROTATION, "") == ""
    assert device.rotate(), "and it can be rotated again"
    collector._store(device.messages())
    assert (refusals(collector), audit(collector.store).passed) == ({}, True)


def test_a_damaged_rotation_is_reissued_in_a_new_log(device: Device, collector: Collector) -> None:
    device.write(2)
    device.rotate()
    device.write(2)
    spoil(device, pending_seq(device))
    begin_new_log(device, through=0)
    collector._store(device.messages())
    assert refusals(collector) == {}
    assert audit(collector.store).passed
    assert collector.store.active_key(DEVICE).kid == device.author.key.public.kid  # type: ignore[union-attr]


def begin_new_log(device: Device, through: int) -> None:
    old = device.store.log_id
    nothing = AcknowledgedSeqs().to_json()
    plan = findings.NewLogPlan(reason="It went back.", old=old, common_through=0, through=through, acknowledged=nothing)
    with device.store.transaction() as tx:
        tx.set_meta(findings.NEW_LOG, msgspec.json.encode(plan).decode())
    new_log.start_new_log(device.store, device.author, NOW)
    device.crash()


def test_a_rotation_that_the_collector_has_is_taken_again_from_a_new_log(device: Device, collector: Collector) -> None:
    device.write(2)
    device.rotate()
    device.write(2)
    collector._store(device.messages())
    keys_before = collector.store.enrolled_keys()
    begin_new_log(device, through=7)
    collector._store(device.messages())
    assert refusals(collector) == {}
    assert security_alerts(collector) == []
    acknowledgement = collector.store.acknowledgement(DEVICE, device.author.log_id)
    assert (acknowledgement.through, acknowledgement.missing) == (len(device.messages()), [])
    assert collector.store.enrolled_keys() == keys_before
    report = audit(collector.store)
    assert report.passed, report.to_dict()
    collector.store.revoke(DEVICE, device.author.key.public.kid, TIME)
    assert audit(collector.store).passed


def test_the_old_key_alone_cannot_reissue_a_rotation(device: Device, collector: Collector) -> None:
    device.rotate()
    collector._store(device.messages())
    followed = device.author.key.public
    thief = MessageSender(key=new_key(1))
    evidence = wire.build_evidence(FLEET, DEVICE, thief.log, 1, new_key(1).public, new_key(66))
    forged = thief.append("audit", event=wire.ROTATION_EVENT, summary="", evidence={**evidence, "key": followed.text})
    collector._store([forged.to_incoming()])
    other = rotate(MessageSender(key=new_key(1)), new_key(66))
    collector._store([other.to_incoming()])
    assert refusals(collector) == {"retired key": 2}


def test_a_rotation_in_the_place_of_a_stored_message_is_refused(collector: Collector) -> None:
    sender = MessageSender(key=new_key(1))
    collector._store([sender.health().to_incoming() for _ in range(3)])
    twin = MessageSender(key=new_key(1), log=sender.log, seq=1)
    conflict = rotate(twin, new_key(66))
    collector._store([conflict.to_incoming(), twin.health().to_incoming(), sender.health().to_incoming()])
    assert stored(collector) == 4
    assert refusals(collector) == {"conflicting payload": 1, "unknown key": 1}
    assert [kid for kid, *_ in collector.store.enrolled_keys()] == [new_key(1).public.kid]
    assert audit(collector.store).passed


def test_a_rotation_in_the_place_of_another_new_message_is_refused(collector: Collector) -> None:
    sender = MessageSender(key=new_key(1))
    twin = MessageSender(key=new_key(1), log=sender.log)
    conflict = rotate(twin, new_key(66))
    collector._store([sender.health().to_incoming(), conflict.to_incoming(), twin.health().to_incoming()])
    assert stored(collector) == 1
    assert refusals(collector) == {"conflicting payload": 1, "unknown key": 1}
    assert audit(collector.store).passed


def test_a_key_revoked_between_verification_and_commit_lets_nothing_in(collector: Collector) -> None:
    sender = MessageSender(key=new_key(1))
    collector._store([sender.health().to_incoming()])
    verify = collector.verify

    def slowly(batch: Sequence[IncomingMessage]) -> Any:
        result = verify(batch)
        collector.store.revoke(DEVICE, None, TIME)
        return result

    collector.verify = slowly  # type: ignore[method-assign]
    collector._store([sender.health().to_incoming(), live_state(new_key(1))])
    assert (stored(collector), refusals(collector)) == (1, {"revoked key": 2})


def test_the_rotation_is_the_last_audit_message_to_be_evicted(device: Device) -> None:
    device.rotate()
    conf = Config(device=DeviceSection(id=DEVICE, fleet=FLEET))
    space = SpaceManager(conf, device.store, device.author, lambda now: None, tuple)
    before = len(device.messages())
    assert space._evict_messages(("audit",), NOW)
    left = [json.loads(message.payload)["event"] for message in device.messages() if message.topic.endswith("/audit")]
    assert left == [wire.ROTATION_EVENT, "evicted"]
    assert before == 2


def test_the_first_key_file_is_never_changed_and_a_new_one_counts_at_once(tmp_path: Path) -> None:
    given = keys.generate(tmp_path / "device.key")
    content = (tmp_path / "device.key").read_bytes()
    device = Device(tmp_path / "data", given)
    device.rotate()
    assert (tmp_path / "device.key").read_bytes() == content
    device.given = new_key(40)
    device.crash()
    assert device.author.key.public.kid == new_key(40).public.kid
    device.store.close()


def test_without_write_access_the_rotation_is_refused_and_the_key_stays(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UsageError("a key cannot be written there: Read-only file system")

    monkeypatch.setattr(keys, "generate", refuse)
    assert not device.rotate()
    assert device.author.key.public.kid == new_key(1).public.kid


def test_key_files_are_readable_by_their_owner_only(device: Device) -> None:
    device.rotate()
    modes = {path.stat().st_mode & 0o777 for path in (device.folder / "keys").iterdir()}
    assert modes == {0o600}
    assert (device.folder / "keys").stat().st_mode & 0o777 == 0o700


def test_no_message_of_another_kind_can_pass_for_a_rotation() -> None:
    sender = MessageSender(key=new_key(1))
    for sent in (sender.health(), sender.append("audit", event="activated", summary="", evidence={})):
        signer = jws.Signer(DEVICE, new_key(1).public)
        message = verify_message(sent.topic, sent.payload, (sent.jws,), {signer.key.kid: signer}.get)
        assert wire.parse_rotation(message) is None


# --- the operator's side of keys ---


def test_messages_of_a_revoked_device_are_refused_and_an_alert_is_raised(collector: Collector) -> None:
    sender = MessageSender(key=new_key(1))
    collector._store([sender.health().to_incoming()])
    kids = collector.store.revoke(DEVICE, None, TIME)
    assert kids == [new_key(1).public.kid]
    collector._store([sender.health().to_incoming()])
    assert (stored(collector), refusals(collector)) == (1, {"revoked key": 1})
    assert audit(collector.store).passed
    assert any("was revoked" in summary for summary in security_alerts(collector))
    with pytest.raises(UsageError, match="no key to revoke"):
        collector.store.revoke(DEVICE, None, TIME)


def test_a_replaced_key_counts_for_its_backlog_only(collector: Collector) -> None:
    old, log = new_key(1), LOG
    first = MessageSender(key=old, log=log)
    sent = [first.health().to_incoming() for _ in range(4)]
    collector._store(sent[:1])
    collector.store.enrol(DEVICE, new_key(30).public, replace=True, now=TIME, keep_through=3)
    collector._store(sent[1:])
    assert (stored(collector), refusals(collector)) == (3, {"retired key": 1})
    follower = MessageSender(key=new_key(30), log=log, seq=3)
    collector._store([follower.health().to_incoming()])
    assert stored(collector) == 4
    collector.store.enrol(DEVICE, new_key(31).public, replace=True, now=TIME)
    collector._store([follower.health().to_incoming()])
    assert refusals(collector)["revoked key"] == 1
