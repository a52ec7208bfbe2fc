"""Retired and revoked devices: neither online nor listed, and what they sent stays evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from outstation.fleet.audit.audit import audit
from outstation.fleet.config import FleetConfig
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.fleet.incidents import incidents
from outstation.fleet.incidents.incidents import IncidentFilter
from outstation.foundation.errors import UsageError
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.workbench.testing.messages import MessageSender, new_key
from tests.kit.commands import call_outstation

NOW = "2026-11-24T22:20:00.000000Z"


def populate(store: FleetStore) -> MessageSender:
    sender = MessageSender("pi-07")
    store.enrol("pi-07", sender.key.public, replace=False, now=NOW)
    sent = [sender.state("online"), sender.results(), sender.alert()]
    store.ingest([Arrival(sender.verify(message)) for message in sent], [], NOW)
    return sender


def states(store: FleetStore, *, with_retired: bool = False) -> dict[str, str]:
    return {row["device"]: row["state"] for row in store.devices(with_retired=with_retired)}


def test_a_revoked_device_is_not_online_and_a_retired_one_is_not_listed(store: FleetStore) -> None:
    populate(store)
    assert states(store) == {"pi-07": "online"}
    with pytest.raises(UsageError, match="may still sign: `outstation fleet devices revoke pi-07`"):
        store.retire("pi-07", "eva", NOW)
    store.revoke("pi-07", None, NOW)
    assert states(store) == {"pi-07": "revoked"}
    assert len([alert for alert in store.alerts() if alert["source"] == "device"]) == 1
    for _ in range(2):
        store.retire("pi-07", "eva", NOW)
    assert states(store) == {}
    assert states(store, with_retired=True) == {"pi-07": "retired"}
    assert store.alerts() == []
    listed = incidents.list_incidents(store, IncidentFilter(open=None), now=NOW)
    assert {incident.status for incident in listed} == {"cleared"}
    assert store.count_messages("pi-07") == 2


def test_a_retired_device_that_is_enrolled_again_is_listed_again(store: FleetStore) -> None:
    populate(store)
    store.revoke("pi-07", None, NOW)
    store.retire("pi-07", "eva", NOW)
    store.enrol("pi-07", new_key(5).public, replace=True, now=NOW)
    assert states(store) == {"pi-07": "online"}


def test_the_audit_verifies_what_a_retired_device_sent(store: FleetStore) -> None:
    populate(store)
    store.revoke("pi-07", None, NOW)
    store.retire("pi-07", "eva", NOW)
    report = audit(store)
    assert (report.passed, report.messages) == (True, 2)


@pytest.fixture
def fleet(tmp_path: Path) -> tuple[Path, FleetConfig]:
    folder = tmp_path / "acme"
    config = init_fleet(folder, "acme", BrokerConfig(url="mqtt://127.0.0.1:1"))
    store = FleetStore(Path(config.fleet.db))
    populate(store)
    store.close()
    return folder, config


def call(folder: Path, *args: str) -> Any:
    done = call_outstation("fleet", *args, "--dir", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_command_revokes_and_removes_and_can_be_repeated(fleet: tuple[Path, FleetConfig]) -> None:
    folder, _ = fleet
    done = call(folder, "remove", "pi-07", "--by", "eva")
    assert (done["removed"], len(done["revoked"])) == (True, 1)
    assert call(folder, "devices") == []
    assert [row["state"] for row in call(folder, "devices", "--all")] == ["retired"]
    assert call(folder, "remove", "pi-07")["revoked"] == []
    assert call(folder, "audit")["passed"] is True
