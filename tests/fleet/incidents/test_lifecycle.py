"""Lifecycle of incidents: raised, acknowledged, muted, cleared, in SQLite and PostgreSQL."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from outstation.fleet.audit.audit import audit
from outstation.fleet.cli.group import fleet as commands
from outstation.fleet.database.incidents import incident_rows
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.incidents import incidents
from outstation.fleet.incidents.incidents import IncidentFilter
from outstation.foundation.errors import UsageError
from outstation.protocol.alerts.incident import Status
from outstation.protocol.alerts.kinds import KINDS, find_kind
from outstation.workbench.testing.messages import MessageSender, SignedMessage

NOW, LATER, DAY = "2026-11-24T22:20:00.000000Z", "2026-11-24T23:20:00.000000Z", "2026-11-25T22:20:00.000000Z"
AX, AY = "exercise/ax/drift/1", "exercise/ay/drift/1"


@pytest.fixture
def sender(store: FleetStore) -> MessageSender:
    made = MessageSender()
    store.enrol(made.device, made.key.public, replace=False, now=NOW)
    return made


def add(store: FleetStore, sender: MessageSender, *sent: SignedMessage) -> None:
    store.ingest([Arrival(sender.verify(item)) for item in sent], [], NOW)


def statuses(store: FleetStore, now: str = NOW) -> dict[str, str]:
    return {i.id: i.status for i in incidents.list_incidents(store, IncidentFilter(open=None), now=now)}


def test_an_alert_is_acknowledged_muted_and_cleared(store: FleetStore, sender: MessageSender) -> None:
    add(store, sender, sender.alert(AX), sender.alert(AY))
    first, second = incidents.list_incidents(store, now=NOW)
    incidents.acknowledge(store, first, by="eva", note="on it", now=NOW)
    incidents.mute(store, second, until=LATER, by="eva", now=NOW)
    assert statuses(store) == {AX: "acknowledged", AY: "muted"}
    assert statuses(store, LATER) == {AX: "acknowledged", AY: "raised"}
    acknowledged = incidents.find_incident(store, first.ref[:6], now=NOW).acknowledged
    assert acknowledged is not None
    assert (acknowledged.by, acknowledged.at, acknowledged.note) == ("eva", NOW, "on it")
    assert incidents.find_incident(store, first.id, now=NOW).ref == first.ref
    with pytest.raises(UsageError, match=r"'nosuch' is no incident; `outstation fleet alerts` lists them"):
        incidents.find_incident(store, "nosuch", now=NOW)
    add(store, sender, sender.alert(AX, "cleared", severity="info", summary="over"))
    assert statuses(store)[AX] == "cleared"
    [cleared] = incidents.list_incidents(store, IncidentFilter(open=False), now=NOW)
    assert (cleared.severity, cleared.summary, cleared.cleared_summary) == ("warning", "ax: gain loss.", "over")
    with pytest.raises(UsageError, match="is cleared"):
        incidents.acknowledge(store, cleared, by="eva", now=NOW)
    assert audit(store).passed


def test_a_new_revision_ends_an_acknowledgement_but_no_mute(store: FleetStore, sender: MessageSender) -> None:
    add(store, sender, sender.alert(AX), sender.alert(AY))
    first, second = incidents.list_incidents(store, now=NOW)
    incidents.acknowledge(store, first, by="eva", now=NOW)
    incidents.acknowledge(store, second, by="eva", now=NOW)
    incidents.mute(store, second, by="eva", now=NOW)
    add(store, sender, sender.alert(AX, revision=2), sender.alert(AY, revision=2))
    assert statuses(store) == {AX: "raised", AY: "muted"}
    incidents.unmute(store, second, by="eva", now=NOW)
    assert statuses(store) == {AX: "raised", AY: "raised"}
    assert [i.revision for i in incidents.list_incidents(store, now=NOW)] == [2, 2]


def test_an_alert_that_comes_back_is_a_new_occurrence(store: FleetStore, sender: MessageSender) -> None:
    add(store, sender, sender.alert(AX))
    incidents.acknowledge(store, incidents.list_incidents(store, now=NOW)[0], by="eva", now=NOW)
    add(store, sender, sender.alert(AX, "cleared"), sender.alert(AX, summary="again"))
    [again] = incidents.list_incidents(store, now=NOW)
    assert (again.status, again.summary, again.seq) == ("raised", "again", 3)


def test_incidents_are_filtered_counted_and_paged(store: FleetStore, sender: MessageSender) -> None:
    add(store, sender, sender.alert(AX, severity="critical"), sender.alert(AY), sender.alert("x", severity="info"))
    assert incidents.count_incidents(store, now=NOW) == {
        ("raised", "critical"): 1,
        ("raised", "warning"): 1,
        ("raised", "info"): 1,
    }
    at_least = incidents.list_incidents(store, IncidentFilter(severity="warning"), now=NOW)
    assert [i.id for i in at_least] == [AX, AY]
    assert incidents.list_incidents(store, IncidentFilter(device="pi-08"), now=NOW) == []
    assert incidents.list_incidents(store, IncidentFilter(since=DAY), now=NOW) == []
    page = incidents.list_incidents(store, now=NOW, newest_first=True, limit=1, offset=1)
    assert [i.id for i in page] == [AY]


def test_statuses_are_counted_with_those_that_are_over(store: FleetStore, sender: MessageSender) -> None:
    add(store, sender, *(sender.alert(identity) for identity in (AX, AY, "x", "y")))
    listed = {incident.id: incident for incident in incidents.list_incidents(store, now=NOW)}
    incidents.acknowledge(store, listed[AX], by="eva", now=NOW)
    incidents.mute(store, listed[AY], until=LATER, by="eva", now=NOW)
    add(store, sender, sender.alert("x", "cleared"), sender.alert("x"), sender.alert("x", revision=2))
    add(store, sender, sender.alert("y", "cleared"))

    def counts(**filters: str | None) -> dict[Status, int]:
        return incidents.count_statuses(store, **{"device": None, "task": None, **filters}, now=NOW)

    expected = {"raised": 1, "acknowledged": 1, "muted": 1, "cleared": 1}
    assert counts() == counts(device=sender.device, task="exercise") == expected
    assert set(counts(task="other").values()) == set(counts(device="other").values()) == {0}
    # What began, was raised last and is open agree with the list of all incidents, which reads all messages.
    everything = incidents.list_incidents(store, IncidentFilter(open=None), now=NOW)
    for wanted in (IncidentFilter(), IncidentFilter(task="exercise"), IncidentFilter(device=sender.device)):
        assert incidents.list_incidents(store, wanted, now=NOW) == [i for i in everything if i.is_open]
    for status in ("raised", "acknowledged", "muted", "cleared"):
        wanted = IncidentFilter(open=None, status=status)
        assert incidents.list_incidents(store, wanted, now=NOW) == [i for i in everything if i.status == status]
    with store.transaction() as db:
        db.execute("UPDATE logs SET live = ?", (False,))
    assert counts() == {"raised": 0, "acknowledged": 0, "muted": 0, "cleared": 4}


@pytest.mark.parametrize("wanted", [{"open": True}, {"status": "muted"}, {"open": True, "task": "exercise"}])
def test_rows_of_cleared_alerts_are_not_read_for_open_ones(tmp_path: Path, wanted: dict[str, object]) -> None:
    store = FleetStore(tmp_path / "fleet.db")
    with store.snapshot() as db:
        sql = incident_rows._select(wanted)
        plan = [str(row[3]) for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", {**wanted, "now": NOW})]
    store.close()
    assert [step for step in plan if step.startswith("SCAN")] == ["SCAN i USING INDEX incidents_raised"], plan


@pytest.mark.parametrize("seed", range(3))
def test_incidents_do_not_depend_on_the_order_of_arrival(store: FleetStore, sender: MessageSender, seed: int) -> None:
    rng = random.Random(seed)
    sent = [
        sender.alert(
            rng.choice((AX, AY, "x")), rng.choice(("raised", "cleared")), revision=rng.choice((1, 2)), summary=f"{n}",
            time=f"2026-11-24T22:18:{n:02}.000000Z",
        )
        for n in range(1, 31)
    ]  # fmt: skip
    expected = {}
    for identity in {json.loads(item.payload)["id"] for item in sent}:
        own = [body for item in sent if (body := json.loads(item.payload))["id"] == identity]
        raised = [body for body in own if body["state"] == "raised"]
        began = [body for body in raised if body["revision"] == 1] or own[:1]
        shown = (raised or own[:1])[-1]
        expected[identity] = (own[-1]["seq"], own[-1]["state"], shown["summary"], shown["revision"], began[-1]["time"])
    rng.shuffle(sent)
    for item in [*sent, *sent[:5]]:
        add(store, sender, item)
    listed = incidents.list_incidents(store, IncidentFilter(open=None), now=NOW)
    assert {i.id: (i.seq, "raised" if i.is_open else "cleared", i.summary, i.revision, i.raised) for i in listed} == (
        expected
    )
    assert audit(store).passed


def test_a_device_cannot_take_the_acknowledgement_of_a_collectors_alert(
    store: FleetStore, sender: MessageSender
) -> None:
    store.revoke(sender.device, None, NOW)
    [revoked] = incidents.list_incidents(store, now=NOW)
    incidents.acknowledge(store, revoked, by="eva", now=NOW)
    other = MessageSender("pi-08", log=sender.log)
    store.enrol("pi-08", other.key.public, replace=False, now=NOW)
    add(store, other, other.alert(revoked.id))
    assert {(i.source, i.status) for i in incidents.list_incidents(store, now=NOW)} == {
        ("collector", "acknowledged"),
        ("device", "raised"),
    }


def test_each_kind_of_alert_is_recognized_by_its_names() -> None:
    for kind in KINDS:
        alert = kind.raised("", None, **dict.fromkeys(re.findall(r"{(\w+)}", kind.subject + kind.id), "x1"))
        task = "t" if kind.source == "task" else None
        identity = f"t/{alert.id}" if task else alert.id
        matched = find_kind(alert.alert, alert.subject, identity, task, from_collector=kind.source == "collector")
        assert matched is not None, kind.title
        assert (matched.alert, matched.source == "collector") == (kind.alert, kind.source == "collector")


def test_the_command_acknowledges_and_mutes(tmp_path: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(commands, ["init", str(tmp_path), "--name", "acme"]).exit_code == 0
    store, sender = FleetStore(tmp_path / "fleet.db"), MessageSender()
    store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
    add(store, sender, sender.alert(AX, summary="ax \x1b[31mred\u202e"))
    store.close()

    def run(*args: str) -> str:
        result = runner.invoke(commands, [*args, "--dir", str(tmp_path)])
        assert result.exit_code == 0, result.output
        return result.output

    [row] = json.loads(run("alerts", "--json"))
    assert (row["state"], row["status"], row["open"], row["acknowledged"]) == ("raised", "raised", True, None)
    assert "\x1b" not in run("alerts")
    assert "\u202e" not in run("alerts")
    assert "acknowledged" in run("alerts", "acknowledge", row["incident"][:6], "--by", "eva", "--note", "on it")
    run("alerts", "mute", row["incident"], "--for", "8 h")
    [muted] = json.loads(run("alerts", "--json"))
    assert (muted["status"], muted["acknowledged"]["by"], muted["acknowledged"]["note"]) == ("muted", "eva", "on it")
    run("alerts", "unmute", row["incident"])
    assert json.loads(run("alerts", "--json"))[0]["status"] == "acknowledged"
    wrong = runner.invoke(commands, ["alerts", "mute", row["incident"], "--until", "tomorrow", "--dir", str(tmp_path)])
    assert isinstance(wrong.exception, UsageError)
    missing = runner.invoke(commands, ["alerts", "mute", "ffffffff", "--dir", str(tmp_path)])
    assert "is no incident; `outstation fleet alerts` lists them" in str(missing.exception)
