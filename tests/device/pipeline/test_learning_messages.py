"""Learning: a refusal raises an alert that is open until a site reference is learned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from outstation.device.batch_parts import drift_state
from outstation.device.recovery.open import open_store
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.ml.drift.state import DriftWindowResult
from outstation.workbench.testing.messages import new_key
from tests.kit.machine import reference

NOW = ClockReading(1_795_000_000_000_000, 1000.0, "synced")
CLOSED = DriftWindowResult(7, (1, 2000), (0, 1), 20, None, None, None, {}, ())
REFUSED = replace(CLOSED, learning_error="the windows do not agree among themselves; gathering 40 new windows")
LEARNED = replace(
    CLOSED, learned_reference=replace(reference(), warning="only 20 drift windows: alarms are less reliable")
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path) as opened:
        yield opened


def tell(store: Store, *verdicts: DriftWindowResult) -> list[dict[str, Any]]:
    """Commit the messages of drift windows, and return what was sent."""
    author, before = MessageLog("acme", "pi-07", new_key(1), store.log_id, 1, 120_000), store.outbox_size()[1]
    for verdict in verdicts:
        refusals = drift_state.load_refusals(store, "exercise")
        messages, refusals = drift_state.build_learning_messages("exercise", verdict, refusals)
        with store.transaction() as tx:
            author.append_all(tx, messages, NOW)
            drift_state.save_refusals(tx, "exercise", refusals)
    return [json.loads(message.payload) for message in store.unacknowledged_messages(before, 100)]


def test_a_window_that_ends_no_gathering_says_nothing(store: Store) -> None:
    assert tell(store, CLOSED) == []


def test_a_refusal_stays_open_under_one_id_until_a_reference_is_learned(store: Store) -> None:
    sent = tell(store, REFUSED, REFUSED)
    alerts = [body for body in sent if body["kind"] == "alerts"]
    assert [(entry["alert"], entry["subject"], entry["state"], entry["severity"]) for entry in alerts] == [
        ("model", "reference", "raised", "info")
    ] * 2
    assert len({entry["id"] for entry in alerts}) == 1
    assert "the windows do not agree among themselves" in alerts[0]["summary"]
    assert [entry["id"] for entry in store.open_alerts("exercise")] == [alerts[0]["id"]]
    [cleared] = [body for body in tell(store, LEARNED) if body["kind"] == "alerts"]
    assert (cleared["state"], cleared["id"]) == ("cleared", alerts[0]["id"])
    assert store.open_alerts("exercise") == []
    again = [body for body in tell(store, REFUSED) if body["kind"] == "alerts"]
    assert again[0]["id"] != cleared["id"]


def test_the_warning_of_few_windows_is_in_the_audit_message(store: Store) -> None:
    [audit] = tell(store, LEARNED)
    assert audit["event"] == "learned"
    assert audit["evidence"]["warning"] == "only 20 drift windows: alarms are less reliable"
