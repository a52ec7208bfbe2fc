"""Attack: somebody runs a copy of a device's card, with its key, next to the device or in its place."""

from __future__ import annotations

from typing import Any

import pytest

from outstation.fleet.audit.audit import audit
from outstation.fleet.database import log_succession
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.foundation.errors import UsageError
from outstation.workbench.testing.messages import MessageSender, SignedMessage, new_key

pytestmark = pytest.mark.attack("clones")

NOW = "2026-11-24T22:20:00.000000Z"
SOON = "2026-11-24T22:20:30.000000Z"
LATER = "2026-11-24T22:40:00.000000Z"
MUCH_LATER = "2026-11-24T23:40:00.000000Z"


@pytest.fixture
def genuine(store: FleetStore) -> MessageSender:
    """Return a device with an open critical alert."""
    sender = MessageSender(key=new_key(7))
    store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
    collect(store, sender, sender.results(), sender.alert(severity="critical"))
    return sender


def collect(store: FleetStore, sender: MessageSender, *sent: SignedMessage, at: str = NOW) -> None:
    store.ingest([Arrival(sender.verify(item)) for item in sent], [], at)


def open_alerts(store: FleetStore) -> list[tuple[str, str, str]]:
    return [(row["alert"], row["severity"], row["log"]) for row in store.alerts() if row["open"]]


def two_logs(log: str) -> tuple[str, str, str]:
    return "security", "critical", f"two-logs/{log}"


def begin(new: MessageSender, old: MessageSender, through: int) -> SignedMessage:
    return new.append("audit", event="new log", summary="", evidence={"old": old.log, "through": through})


def live(store: FleetStore) -> list[str]:
    return [row["log"] for row in store.device_logs("pi-07") if row["live"]]


def test_a_message_in_a_clones_own_log_silences_no_alert_and_raises_one(
    store: FleetStore, genuine: MessageSender
) -> None:
    clone = MessageSender(key=genuine.key)
    collect(store, clone, clone.results())
    assert open_alerts(store) == [("drift", "critical", genuine.log), two_logs(clone.log)]
    [listed] = store.devices()
    assert (listed["logs"], listed["alerts"], listed["through"]) == (2, 2, 2)
    assert dict(store.newest_logs()) == {"pi-07": genuine.log}
    assert audit(store).passed


@pytest.mark.attack("clones", control=True)
def test_where_the_log_that_arrived_last_counts_alone_a_clone_silences_the_device(
    store: FleetStore, genuine: MessageSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_succession, "find_live_logs", lambda logs, _: {[log for log, *_ in logs][-1]})
    clone = MessageSender(key=genuine.key)
    collect(store, clone, clone.results())
    assert open_alerts(store) == []


def test_a_clone_cannot_clear_alerts_of_the_device_in_its_own_log(store: FleetStore, genuine: MessageSender) -> None:
    clone = MessageSender(key=genuine.key)
    collect(store, clone, clone.alert(state="cleared"), clone.alert(state="cleared", severity="critical"))
    assert ("drift", "critical", genuine.log) in open_alerts(store)


@pytest.mark.parametrize("through", [0, 1])
def test_a_clone_that_names_a_log_which_went_further_ends_nothing(
    store: FleetStore, genuine: MessageSender, through: int
) -> None:
    clone = MessageSender(key=genuine.key)
    collect(store, clone, begin(clone, genuine, through))
    assert two_logs(clone.log) in open_alerts(store)
    assert ("drift", "critical", genuine.log) in open_alerts(store)


def test_a_clone_that_ends_the_log_is_detected_once_the_device_goes_on(
    store: FleetStore, genuine: MessageSender
) -> None:
    clone = MessageSender(key=genuine.key)
    collect(store, clone, begin(clone, genuine, genuine.seq))
    assert live(store) == [clone.log]
    collect(store, genuine, genuine.results(), at=SOON)
    assert open_alerts(store) == [("drift", "critical", genuine.log), two_logs(clone.log)]
    assert audit(store).passed


def test_a_clone_that_claims_an_end_far_ahead_is_detected_once_the_device_goes_on(
    store: FleetStore, genuine: MessageSender
) -> None:
    clone = MessageSender(key=genuine.key)
    collect(store, clone, begin(clone, genuine, 2**53 - 1))
    collect(store, genuine, genuine.results(), at=LATER)
    assert open_alerts(store) == [("drift", "critical", genuine.log), two_logs(clone.log)]
    assert audit(store).passed


def test_two_logs_that_end_each_other_both_live(store: FleetStore, genuine: MessageSender) -> None:
    clone = MessageSender(key=genuine.key)
    collect(store, clone, begin(clone, genuine, 2**53 - 1), begin(genuine, clone, 2**53 - 1))
    assert len(live(store)) == 2
    assert ("drift", "critical", genuine.log) in open_alerts(store)


def test_a_log_that_the_device_itself_ends_is_replaced_without_an_alert(
    store: FleetStore, genuine: MessageSender
) -> None:
    new = MessageSender(key=genuine.key)
    repeated = new.results(reissued={"log": genuine.log, "seq": 3})
    collect(store, new, repeated, at=SOON)
    assert open_alerts(store) == []
    collect(store, new, begin(new, genuine, 3), new.alert("other/1"), at=SOON)
    assert live(store) == [new.log]
    assert open_alerts(store) == [("drift", "warning", new.log)]
    # A message of the old log was in transit.
    collect(store, genuine, genuine.results(), at=SOON)
    assert live(store) == [new.log]
    assert dict(store.newest_logs()) == {"pi-07": new.log}
    assert audit(store).passed, audit(store).to_dict()


def test_the_alert_ends_once_the_new_log_names_the_old_one(store: FleetStore, genuine: MessageSender) -> None:
    new = MessageSender(key=genuine.key)
    named = new.results(), begin(new, genuine, genuine.seq)
    collect(store, new, named[0])
    assert two_logs(new.log) in open_alerts(store)
    collect(store, new, named[1], at=SOON)
    assert open_alerts(store) == []


def test_an_operators_word_ends_a_log_until_it_goes_on(store: FleetStore, genuine: MessageSender) -> None:
    clone = MessageSender(key=genuine.key)
    collect(store, clone, clone.alert("other/1"))
    assert store.accept_log("pi-07", genuine.log, LATER) == [clone.log]
    assert open_alerts(store) == [("drift", "critical", genuine.log)]
    assert audit(store).passed, audit(store).to_dict()
    collect(store, clone, clone.results(), at=MUCH_LATER)
    assert two_logs(clone.log) in open_alerts(store)
    assert store.accept_log("pi-07", clone.log, MUCH_LATER) == [genuine.log]
    assert open_alerts(store) == [("drift", "warning", clone.log)]
    assert audit(store).passed, audit(store).to_dict()
    with pytest.raises(UsageError, match="has no log"):
        store.accept_log("pi-07", "no such log", LATER)


def test_a_device_enrolled_anew_begins_a_log_without_an_alert(store: FleetStore, genuine: MessageSender) -> None:
    new = MessageSender(key=new_key(8))
    store.enrol("pi-07", new.key.public, replace=True, now=LATER)
    collect(store, new, new.results(), at=MUCH_LATER)
    assert live(store) == [new.log]
    assert open_alerts(store) == []
    assert audit(store).passed, audit(store).to_dict()


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE logs SET live = FALSE WHERE log = :log",
        "INSERT INTO log_successors SELECT device, log, :log, last_seq, latest, 'device' FROM logs WHERE log <> :log",
    ],
)
def test_an_operator_who_ends_a_log_in_the_tables_fails_the_audit(
    store: FleetStore, genuine: MessageSender, sql: str
) -> None:
    clone = MessageSender(key=genuine.key)
    collect(store, clone, clone.results())
    values: dict[str, Any] = {"log": clone.log}
    with store.transaction() as db:
        db.execute(sql, values)
    assert not audit(store).passed


@pytest.mark.parametrize("order", ["old first", "new first", "together"])
def test_the_order_of_arrival_does_not_change_which_log_lives(
    store: FleetStore, genuine: MessageSender, order: str
) -> None:
    new = MessageSender(key=genuine.key)
    parts = [(genuine, genuine.results()), (new, begin(new, genuine, 3)), (new, new.results())]
    if order == "new first":
        parts = [parts[2], parts[1], parts[0]]
    if order == "together":
        store.ingest([Arrival(sender.verify(item)) for sender, item in parts], [], SOON)
    else:
        for sender, item in parts:
            collect(store, sender, item, at=SOON)
    assert live(store) == [new.log]
    assert open_alerts(store) == []
