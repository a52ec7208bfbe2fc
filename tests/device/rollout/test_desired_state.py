"""Desired state of a device: verification, groups and order of messages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.device.recovery.open import open_store
from outstation.device.rollout.desired_state import DesiredStateStore
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.uplink.sink import Sink
from outstation.device.uplink.uplink import Uplink
from outstation.foundation.errors import LinkDown, MessageRefused, StorageFull
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.protocol.wire import jws
from outstation.protocol.wire.desired_state import MAX_DESIRED_BYTES
from outstation.protocol.wire.jws import encode
from outstation.protocol.wire.keys import SigningKey
from outstation.workbench.testing.messages import new_key
from tests.kit.operators import DEVICE, FLEET, NOW, trusted_keys
from tests.kit.stations import conf

OPERATOR, SECOND, FOREIGN = new_key(77), new_key(78), new_key(79)
OWN = f"outstation/{FLEET}/{DEVICE}/desired"
ALL = f"outstation/{FLEET}/_all/desired"
ROOF, YARD, CELLAR = (f"outstation/{FLEET}/_group/desired/{name}" for name in ("roof", "yard", "cellar"))
COUNTERS = itertools.count(1)


def wanted(version: str, strategy: str = "shadow", **more: Any) -> dict[str, Any]:
    named = {"rollout": f"r-{version}", "bundle": "tiny", "version": version, "digest": "sha256:" + "a" * 64}
    return {**named, "strategy": strategy, **more}


def signed(topic: str, tasks: dict[str, Any], /, *, key: SigningKey = OPERATOR, **changes: Any) -> IncomingMessage:
    """A retained message; `changes` replace members of the payload."""
    parts = topic.split("/")
    head: dict[str, Any] = {"v": 1, "kind": "desired", "device": parts[2]}
    if len(parts) > 4:
        head["group"] = parts[4]
    body = {"counter": next(COUNTERS), "issued": "2026-11-26T00:00:00Z", "tasks": tasks}
    payload = encode({**head, **body, **changes})
    return IncomingMessage(topic, payload, (jws.sign(key, topic, payload),), True, 1, 1)


@dataclass
class Desk:
    """A device's store and what is desired of it, that can crash and open again."""

    folder: Path
    keys: list[SigningKey] = field(default_factory=lambda: [OPERATOR, SECOND])
    groups: list[str] = field(default_factory=lambda: ["roof", "yard"])

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        self.store = open_store(self.folder)
        self.author = MessageLog(FLEET, DEVICE, new_key(1), self.store.log_id, self.store.boot, 120_000)
        self.desires = DesiredStateStore(
            self.store, self.author, trusted_keys(self.store, self.author, *self.keys), self.groups
        )

    def crash(self) -> None:
        self.store.close()
        self.open()

    def take(self, *deliveries: IncomingMessage) -> None:
        for delivery in deliveries:
            self.desires.accept(delivery)
            self.desires.apply_pending(NOW)

    def refused(self, delivery: IncomingMessage) -> str:
        """The reason; "" where it is taken."""
        try:
            self.take(delivery)
        except MessageRefused as refusal:
            return refusal.reason
        return ""

    def version(self, task: str = "sort") -> str | None:
        result = self.desires.find_desired(task)
        return None if result is None else result.version


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.store.close()


def test_a_device_subscribes_to_its_own_group_and_fleet_topics(desk: Desk) -> None:
    assert desk.desires.subscriptions == [OWN, ROOF, YARD, ALL]


def test_without_operators_there_is_no_subscription(tmp_path: Path) -> None:
    desk = Desk(tmp_path, keys=[])
    assert desk.desires.subscriptions == []
    desk.store.close()


def test_the_desired_state_survives_a_restart(desk: Desk) -> None:
    desk.take(signed(OWN, {"sort": wanted("2")}))
    assert desk.version() == "2"
    desk.crash()
    assert desk.version() == "2"


def test_the_most_specific_topic_of_a_task_applies(desk: Desk) -> None:
    deliveries = [(OWN, "own"), (ROOF, "roof"), (YARD, "yard"), (ALL, "all")]
    for topic, version in deliveries:
        desk.take(signed(topic, {"sort": wanted(version)}))
    for topic, version in deliveries:
        assert desk.version() == version
        desk.take(signed(topic, {"other": wanted("9")}))
    assert desk.version() is None
    assert desk.version("other") == "9"


def test_a_repeated_message_changes_nothing(desk: Desk) -> None:
    first = signed(OWN, {"sort": wanted("2")})
    desk.take(first)
    reported: list[int] = []
    desk.desires.on_change = lambda: reported.append(1)
    assert desk.refused(first) == ""
    desk.crash()
    desk.desires.on_change = lambda: reported.append(1)
    assert desk.refused(first) == ""
    assert (desk.version(), reported) == ("2", [])


def test_an_older_message_is_refused_even_after_a_restart(desk: Desk) -> None:
    old, new = signed(OWN, {"sort": wanted("1")}), signed(OWN, {"sort": wanted("2")})
    desk.take(old, new)
    assert desk.refused(old) == "replayed"
    desk.crash()
    assert (desk.refused(old), desk.version()) == ("replayed", "2")


def test_another_message_with_the_same_counter_is_refused(desk: Desk) -> None:
    desk.take(signed(OWN, {"sort": wanted("2")}, counter=10**6))
    assert desk.refused(signed(OWN, {"sort": wanted("3")}, counter=10**6)) == "replayed"
    assert desk.version() == "2"


def test_a_message_replaced_by_another_operator_cannot_return(desk: Desk) -> None:
    first = signed(OWN, {"sort": wanted("1")})
    desk.take(first, signed(OWN, {"sort": wanted("2")}, key=SECOND, counter=1))
    assert (desk.refused(first), desk.version()) == ("replayed", "2")


def test_topics_have_independent_counters(desk: Desk) -> None:
    desk.take(signed(OWN, {"other": wanted("1")}, counter=10**9), signed(ALL, {"sort": wanted("2")}, counter=1))
    assert desk.version() == "2"


def test_another_devices_message_is_refused(desk: Desk) -> None:
    theirs = f"outstation/{FLEET}/pi-08/desired"
    result = signed(theirs, {"sort": wanted("2")})
    assert desk.refused(result) == "other topic"
    moved = IncomingMessage(OWN, result.payload, result.tokens, True, 1, 1)
    assert desk.refused(moved) == "other topic"
    payload = result.payload
    resigned = IncomingMessage(OWN, payload, (jws.sign(OPERATOR, OWN, payload),), True, 1, 1)
    assert desk.refused(resigned) == "other device"
    assert desk.version() is None


def test_another_groups_message_is_refused(desk: Desk) -> None:
    assert desk.refused(signed(CELLAR, {"sort": wanted("2")})) == "other topic"
    assert desk.refused(signed(ROOF, {"sort": wanted("2")}, group="yard")) == "other task"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tasks": {"sort": wanted("2") | {"urgent": True}}}, "malformed payload"),
        ({"until": "2027-01-01T00:00:00Z"}, "malformed payload"),
        ({"tasks": {"sort": wanted("2", "at once")}}, "malformed payload"),
        ({"tasks": {"sort": wanted("2") | {"digest": "sha256:../../etc"}}}, "malformed payload"),
        ({"tasks": {"../sort": wanted("2")}}, "malformed payload"),
        ({"counter": 0}, "malformed payload"),
        ({"kind": "cmd"}, "malformed payload"),
        ({"pad": "x" * MAX_DESIRED_BYTES}, "too large"),
    ],
    ids=["member", "condition", "strategy", "digest", "task", "counter", "kind", "size"],
)
def test_a_signed_message_with_invalid_content_is_refused(desk: Desk, changes: dict[str, Any], reason: str) -> None:
    assert desk.refused(signed(OWN, {"sort": wanted("2")}, **changes)) == reason
    assert desk.version() is None


def test_another_key_than_an_operators_is_refused(desk: Desk) -> None:
    assert desk.refused(signed(OWN, {"sort": wanted("2")}, key=FOREIGN)) == "unknown key"


def test_a_duplicate_json_key_is_refused(desk: Desk) -> None:
    payload = signed(OWN, {"sort": wanted("2")}).payload.replace(b'"v":1', b'"v":1,"v":1')
    assert (
        desk.refused(IncomingMessage(OWN, payload, (jws.sign(OPERATOR, OWN, payload),), True, 1, 1)) == "duplicate key"
    )


def test_removing_an_operators_key_ends_their_desired_state(desk: Desk) -> None:
    desk.take(signed(OWN, {"sort": wanted("2")}))
    desk.keys = [SECOND]
    desk.crash()
    assert desk.version() is None
    desk.keys = [OPERATOR]
    desk.crash()
    assert desk.version() == "2"


def test_a_message_is_in_force_only_once_it_is_stored(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageFull("full")

    with monkeypatch.context() as patched:
        patched.setattr(desk.store, "transaction", full)
        desk.take(signed(OWN, {"sort": wanted("2")}))
        assert desk.version() is None
    desk.desires.apply_pending(NOW)
    assert desk.version() is None
    later = type(NOW)(NOW.wall_us, NOW.boot_s + 60, NOW.quality)
    desk.desires.apply_pending(later)
    assert desk.version() == "2"


def test_a_damaged_stored_message_is_ignored_until_it_arrives_again(desk: Desk) -> None:
    delivery = signed(OWN, {"sort": wanted("2")})
    desk.take(delivery)
    with desk.store.transaction() as tx:
        tx.save_state("", task_keys.DESIRED_STATE_PREFIX + OWN, b"\xc1 broken")
    desk.crash()
    assert desk.version() is None
    desk.take(delivery)
    assert desk.version() == "2"


def no_sink(subscriptions: Sequence[str], will: OutgoingMessage) -> Sink:
    raise LinkDown("no sink in this test")


def test_refused_messages_are_counted_and_raise_one_alert(desk: Desk, tmp_path: Path) -> None:
    uplink = Uplink(
        *(conf(tmp_path), desk.store, desk.author, lambda _kid: None, lambda: NOW, lambda error: None, no_sink),
        receivers=[desk.desires],
    )
    old, new = signed(OWN, {"sort": wanted("1")}), signed(OWN, {"sort": wanted("2")})
    theirs = signed(f"outstation/{FLEET}/pi-08/desired", {"sort": wanted("3")})
    assert all(uplink._handle_delivery(entry, NOW) for entry in (old, new, old, theirs, signed(OWN, {}, key=FOREIGN)))
    assert not uplink._handle_delivery(IncomingMessage(f"outstation/{FLEET}/{DEVICE}/ack", b"", (), True, 1, 1), NOW)
    uplink._refusals.flush(NOW, force=True)
    counted = {name: n for name, n in desk.store.counters().items() if name.startswith("desired")}
    assert counted == {
        "desired states refused": 3,
        "desired states refused: replayed": 1,
        "desired states refused: other topic": 1,
        "desired states refused: unknown key": 1,
    }
    assert [alert["id"] for alert in desk.store.recent_alerts(10)] == ["_device/security/refused"]
    desk.desires.apply_pending(NOW)
    assert desk.version() == "2"


@given(payload=st.binary(max_size=300), token=st.text(max_size=80), sign=st.booleans())
def test_hostile_bytes_are_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, payload: bytes, token: str, sign: bool
) -> None:
    desk = Desk(tmp_path_factory.mktemp("hostile"))
    try:
        tokens = (jws.sign(OPERATOR, OWN, payload) if sign else token,)
        assert desk.refused(IncomingMessage(OWN, payload, tokens, True, 1, 1)) != ""
        assert desk.version() is None
    finally:
        desk.store.close()
