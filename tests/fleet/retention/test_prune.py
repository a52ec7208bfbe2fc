"""Retention: old evidence goes, what stays passes the audit, and a signed statement says what went."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from outstation.fleet import config as fleet_config
from outstation.fleet.audit.audit import audit, audit_from_checkpoint
from outstation.fleet.audit.audit_report import AuditReport
from outstation.fleet.audit.checkpoint import CheckpointFolder
from outstation.fleet.cli.group import fleet
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.maintenance import pruning
from outstation.fleet.database.maintenance.retention import Retention
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.fleet.retention.prune import PruneReport, prune
from outstation.foundation import clock
from outstation.foundation.config.quantities import Duration
from outstation.foundation.errors import ConfigError
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.workbench.testing.messages import FLEET, MessageSender, SignedMessage, new_key

DAY_US = 86_400_000_000
OLD, MIDDLE, NEW = (clock.parse_rfc3339(f"2026-{month:02}-01T00:00:00Z") for month in (1, 6, 11))
KEY = new_key(99)
QUARTER = Retention(messages=Duration(90 * 86400.0))


def ingest(store: FleetStore, sender: MessageSender, at_us: int, *sent: SignedMessage) -> list[str]:
    now = clock.to_rfc3339(at_us)
    if store.active_key(sender.device) is None:
        store.enrol(sender.device, sender.key.public, replace=False, now=now)
    return list(store.ingest([Arrival(sender.verify(item)) for item in sent], [], now))


def anchor(sender: MessageSender, boot: int) -> SignedMessage:
    evidence: dict[str, Any] = {
        "boot": boot,
        "segment": 1,
        "boot_us": 10**6 * boot,
        "wall_us": 1_764_022_680_000_000 + 10**9 * boot,
    }
    evidence |= {"quality": "synced", "error_us": 50, "step_us": 3}
    return sender.append("audit", event="clock", summary="", evidence=evidence)


def everything(sender: MessageSender, name: str) -> list[SignedMessage]:
    """Return a message of each kind, and some that are missing and declared."""
    sent = [anchor(sender, len(name)), sender.results(3), sender.drift(), sender.quiet_run(), sender.alert(name)]
    metrics = [{"metric": "accuracy", "value": 0.9, "low": 0.8, "high": 0.95, "n": 20}]
    sent += [sender.append("quality", task=sender.task, metrics=metrics), sender.shadow(), sender.rollout("shadow")]
    lost = sender.health_with_cursor()
    return [*sent, sender.evicted((lost.seq, lost.seq)), sender.health_with_cursor(), sender.results(2)]


def run(store: FleetStore, settings: Retention = QUARTER, now_us: int = NEW, *, dry: bool = False) -> PruneReport:
    return prune(store, settings, FLEET, None if dry else KEY, [KEY.public], now_us)


def check(store: FleetStore, device: str | None = None) -> AuditReport:
    return audit(store, device, collectors=[KEY.public])


def rows(store: FleetStore, table: str, columns: str = "*") -> list[tuple[Any, ...]]:
    with store.snapshot() as db:
        return sorted((tuple(row) for row in db.execute(f"SELECT {columns} FROM {table}")), key=repr)


def test_old_messages_go_and_what_stays_passes(store: FleetStore) -> None:
    first, second = MessageSender("pi-07"), MessageSender("pi-08")
    old = everything(first, "a")
    assert set(ingest(store, first, OLD, *old)) == {"new"}
    ingest(store, first, NEW, *everything(first, "b"))
    ingest(store, second, NEW, *everything(second, "c"))
    gaps, devices = store.gaps(), store.devices()
    thirty = Retention(messages=Duration(30 * 86400.0))
    planned = run(store, thirty, dry=True)
    assert [(entry.device, entry.messages) for entry in planned.devices] == [("pi-07", 11)]
    assert store.count_messages() == 33
    report = run(store, thirty)
    assert [(entry.device, entry.messages) for entry in report.devices] == [("pi-07", 11)]
    assert report.devices[0].removed > 11
    assert store.count_messages() == 22
    audited = check(store)
    assert audited.passed, audited.to_dict()
    assert audited.pruned == [
        {"device": "pi-07", "time": clock.to_rfc3339(NEW), "log": first.log, "table": "messages",
         "through": old[-1].seq,
         "count": 11}
    ]  # fmt: skip
    # Gaps do not appear, and open alerts stay.
    assert store.gaps() == gaps
    assert store.devices() == devices
    assert {row[0] for row in rows(store, "alerts", "id")} == {"a", "b", "c"}
    for table in ("results", "result_messages", "drift_windows", "metrics", "shadows", "rollout_devices", "stamps"):
        assert min(seq for (seq,) in rows(store, f"{table} WHERE device = 'pi-07'", "seq")) > old[-1].seq, table
    [(payload,)] = rows(store, "retention", "payload")
    statement = json.loads(payload)
    [log] = statement["logs"]
    assert (log["first"], log["through"], log["messages"]) == (1, old[-1].seq, 11)
    assert log["kinds"] == {"alerts": 1, "audit": 3, "drift": 2, "health": 1, "quality": 1, "results": 2, "shadow": 1}
    assert run(store, thirty).devices == []
    assert check(store, "pi-07").passed


def test_pruned_again_and_again_the_audit_passes(store: FleetStore) -> None:
    sender = MessageSender()
    for month in range(1, 8):
        at_us = clock.parse_rfc3339(f"2026-{month:02}-01T00:00:00Z")
        ingest(store, sender, at_us, *everything(sender, f"alert-{month}"))
        if month == 3:
            cleared = sender.alert("alert-1", "cleared")
            ingest(store, sender, at_us, cleared)
        run(store, Retention(messages=Duration(40 * 86400.0), results=Duration(20 * 86400.0)), at_us)
        audited = check(store)
        assert audited.passed, (month, audited.to_dict())
    assert rows(store, "retention", "n, state IS NULL")[-1][0] >= 5
    assert [n for n, without_state in rows(store, "retention", "n, state IS NULL") if not without_state] == [
        max(n for (n,) in rows(store, "retention", "n"))
    ]
    # A cleared alert goes with its message; open ones stay.
    assert {row[0] for row in rows(store, "alerts", "id")} == {f"alert-{month}" for month in range(2, 8)}


def test_tables_have_their_own_retention(store: FleetStore) -> None:
    sender = MessageSender()
    ingest(store, sender, OLD, sender.results(3), sender.drift(), sender.results(2))
    ingest(store, sender, NEW, sender.results(1), sender.drift(), sender.health())
    report = run(store, Retention(results=Duration(86400.0), drift_windows=Duration(365 * 86400.0)))
    [entry] = report.devices
    assert (entry.messages, entry.tables) == (0, {"results": 5, "result_details": 0, "drift_windows": 0})
    assert rows(store, "results", "seq") == [(4,)]
    assert len(rows(store, "drift_windows")) == 2
    assert store.count_messages() == 6
    assert check(store).passed
    with store.transaction() as db:
        db.execute("DELETE FROM results WHERE seq = 4")
    assert not check(store).passed


def test_a_pruned_message_that_arrives_again_is_a_duplicate(store: FleetStore) -> None:
    sender = MessageSender()
    old, new = [sender.results(2) for _ in range(3)], [sender.results(1), sender.health()]
    ingest(store, sender, OLD, *old)
    ingest(store, sender, NEW, *new)
    run(store)
    before = rows(store, "results")
    assert ingest(store, sender, NEW, *old, *new) == ["duplicate"] * 5
    assert rows(store, "results") == before
    assert check(store).passed
    ingest(store, sender, NEW, sender.results(1))
    assert check(store).passed


def test_the_newest_message_and_what_follows_an_open_gap_stay(store: FleetStore) -> None:
    sender, other = MessageSender("pi-07"), MessageSender("pi-08")
    sent = [sender.results(1) for _ in range(5)]
    ingest(store, sender, OLD, *sent[:2], *sent[3:])
    ingest(store, other, OLD, *(other.results(1) for _ in range(3)))
    run(store)
    assert rows(store, "messages", "device, seq") == [("pi-07", 4), ("pi-07", 5), ("pi-08", 3)]
    before = store.acknowledgement("pi-08", other.log)
    assert (before.through, before.missing) == (3, [])
    assert before.digest is not None
    assert [gap["declared"] for gap in store.gaps()] == [False]
    ingest(store, sender, NEW, sent[2])
    assert check(store).passed


def test_logs_that_follow_each_other_are_pruned(store: FleetStore) -> None:
    old = MessageSender()
    ingest(store, old, OLD, *everything(old, "a"), old.results(2))
    new = MessageSender(key=old.key)
    evidence = {"old": old.log, "through": old.seq + 1, "reissued": 0}
    ingest(store, new, MIDDLE, new.append("audit", event="new log", summary="", evidence=evidence), new.results(2))
    assert check(store).passed
    run(store)
    run(store, Retention(messages=Duration(86400.0)))
    audited = check(store)
    assert audited.passed, audited.to_dict()
    assert store.count_messages() == 2
    assert [row["live"] for row in store.device_logs("pi-07")] == [False, True]


@pytest.mark.attack("audit")
@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM retention",
        "UPDATE retention SET payload = CAST(replace(CAST(payload AS TEXT), '\"n\":1', '\"n\":2') AS BLOB)",
        "UPDATE retention SET state = CAST(replace(CAST(state AS TEXT), '[1,1]', '[1,9]') AS BLOB)",
        "UPDATE retention SET n = 2",
        "UPDATE retention SET device = 'pi-08'",
        "DELETE FROM messages WHERE seq = 5",
        "UPDATE alerts SET summary = 'Nothing.' WHERE seq = 3",
        "DELETE FROM alerts WHERE seq = 3",
        "UPDATE gaps SET last = 9",
        "DELETE FROM anchors",
        "UPDATE logs SET last_seq = 9",
    ],
)
def test_what_went_cannot_be_altered(tmp_path: Path, sql: str) -> None:
    store, sender = FleetStore(tmp_path / "fleet.db"), MessageSender()
    lost = sender.health()
    ingest(store, sender, OLD, anchor(sender, 1), sender.alert(), sender.evicted((lost.seq, lost.seq)))
    ingest(store, sender, NEW, sender.results(1), sender.health())
    run(store)
    assert check(store).passed
    with store.transaction() as db:
        before = rows(store, "retention")
        assert db.execute(sql).rowcount == 1
        assert rows(store, "retention") != before or "retention" not in sql
    assert not check(store).passed
    store.close()


@pytest.mark.attack("audit")
def test_a_statement_of_another_key_is_no_excuse(store: FleetStore) -> None:
    sender = MessageSender()
    ingest(store, sender, OLD, sender.results(1), sender.results(1))
    forger = new_key(7)
    prune(store, QUARTER, FLEET, forger, [forger.public], NEW + 365 * DAY_US)
    assert store.count_messages() == 1
    audited = check(store)
    assert not audited.passed
    assert "retention statements do not verify" in audited.invalid[0]["reason"]
    # And nothing more of it goes.
    ingest(store, sender, OLD, sender.results(1))
    assert list(run(store, now_us=NEW + 365 * DAY_US).refused) == ["pi-07"]


@pytest.mark.attack("audit")
def test_evidence_that_does_not_verify_stays(store: FleetStore) -> None:
    sender = MessageSender()
    ingest(store, sender, OLD, sender.results(1), sender.results(1), sender.health())
    with store.transaction() as db:
        db.execute("UPDATE results SET value = 7 WHERE seq = 1")
    report = run(store, now_us=NEW + 365 * DAY_US)
    assert report.devices == []
    assert "1 messages do not verify" in report.refused["pi-07"]
    assert store.count_messages() == 3


def test_an_audit_from_a_checkpoint_follows_a_pruning(store: FleetStore, tmp_path: Path) -> None:
    sender, other = MessageSender("pi-07"), MessageSender("pi-08")
    ingest(store, sender, OLD, *everything(sender, "a"))
    ingest(store, other, NEW, *everything(other, "b"))
    folder = CheckpointFolder(tmp_path / "audit", FLEET, [KEY.public])
    for step in range(4):
        report, _ = audit_from_checkpoint(store, folder, KEY, collectors=[KEY.public])
        assert report.passed, (step, report.to_dict())
        ingest(store, sender, NEW, *everything(sender, f"more-{step}"))
        run(store, Retention(messages=Duration(86400.0)), NEW + step * 2 * DAY_US)


def test_killed_in_the_middle_everything_is_there_or_stated(tmp_path: Path) -> None:
    for device in range(6):
        sender = MessageSender(f"pi-{device}", new_key(device + 1))
        store = FleetStore(tmp_path / "fleet.db")
        ingest(store, sender, OLD, *everything(sender, "a"))
        ingest(store, sender, NEW, *everything(sender, "b"))
        store.close()
    program = (
        "import sys; from tests.fleet.retention.test_prune import *; s = FleetStore(sys.argv[1]);"
        "original = pruning.remove;\n"
        "def remove(*args):\n print('.', flush=True); return original(*args)\n"
        "pruning.remove = remove; run(s, Retention(messages=Duration(86400.0)))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "fleet.db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    store = FleetStore(tmp_path / "fleet.db")
    assert check(store).passed
    assert 0 < len(check(store).pruned) < 6
    run(store, Retention(messages=Duration(86400.0)))
    assert check(store).passed
    assert len(check(store).pruned) == 6
    store.close()


def test_interrupted_before_the_commit_nothing_went(store: FleetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = MessageSender()
    ingest(store, sender, OLD, *everything(sender, "a"))
    ingest(store, sender, NEW, sender.health())

    class Killed(Exception):
        pass

    def delete(*_: object) -> int:
        raise Killed

    monkeypatch.setattr(pruning, "_delete_alerts", delete)
    with pytest.raises(Killed):
        run(store)
    assert store.count_messages() == 12
    assert rows(store, "retention") == rows(store, "pruned_logs") == []
    monkeypatch.undo()
    assert run(store).devices[0].messages == 11
    assert check(store).passed


def test_messages_that_arrive_meanwhile_are_planned_again(store: FleetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = MessageSender()
    lost = sender.results(1)
    ingest(store, sender, OLD, sender.evicted((lost.seq, lost.seq)), sender.results(1))
    ingest(store, sender, NEW, sender.health())
    original = pruning.remove
    arrived: list[str] = []

    def remove(*arguments: Any) -> int:
        if not arrived:
            arrived.extend(ingest(store, sender, OLD, lost))
        return original(*arguments)

    monkeypatch.setattr(pruning, "remove", remove)
    [entry] = run(store).devices
    assert (arrived, entry.messages) == (["new"], 3)
    assert check(store).passed


def test_collectors_write_while_devices_are_pruned(store: FleetStore) -> None:
    senders = [MessageSender(f"pi-{i}") for i in range(4)]
    for sender in senders:
        ingest(store, sender, OLD, *everything(sender, "a"))
    # As collectors have it: several devices in one transaction.
    rounds = [[Arrival(sender.verify(sender.results(2))) for sender in senders] for _ in range(30)]
    problems: list[BaseException] = []

    def collect() -> None:
        other = FleetStore(store.location)
        try:
            for step, arrivals in enumerate(rounds):
                other.ingest(arrivals, [], clock.to_rfc3339(MIDDLE + step * DAY_US))
        except BaseException as error:
            problems.append(error)
        finally:
            other.close()

    thread = threading.Thread(target=collect)
    thread.start()
    step = 0
    while thread.is_alive() or step < 3:
        run(store, Retention(messages=Duration(86400.0)), MIDDLE + 10 * step * DAY_US)
        step += 1
    thread.join()
    assert problems == []
    report = check(store)
    assert report.passed, report.invalid
    assert audit(store, processes=2, collectors=[KEY.public]).passed


def test_the_command_prunes_and_the_audit_says_what_went(tmp_path: Path) -> None:
    home, now_us = tmp_path / FLEET, clock.read().wall_us
    config = init_fleet(home, FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
    sender = MessageSender()
    with FleetStore(config.fleet.db) as store:
        ingest(store, sender, now_us - 40 * DAY_US, *everything(sender, "a"))
        ingest(store, sender, now_us, sender.health())

    def command(*arguments: str) -> Any:
        result = CliRunner().invoke(fleet, [*arguments, "--dir", str(home), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    assert command("audit")["checkpoint"] is None
    with (home / "fleet.toml").open("a") as file:
        file.write('\n[retention]\nmessages = "30 d"\n')
    assert command("prune", "--dry-run")["devices"][0]["messages"] == 11
    assert command("prune")["devices"][0]["messages"] == 11
    assert command("prune")["devices"] == []
    for options in ([], ["--full"], ["--device", "pi-07"]):
        audited = command("audit", *options)
        assert (audited["passed"], audited["messages"], audited["pruned"][0]["count"]) == (True, 1, 11)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('messages = "2 h"', "must be a day or more"),
        ('messages = "10 d"\nresults = "20 d"', "longer than retention.messages"),
        ('mesages = "10 d"', "mesages"),
    ],
)
def test_a_retention_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    init_fleet(tmp_path / FLEET, FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
    file = tmp_path / FLEET / "fleet.toml"
    file.write_text(f"{file.read_text()}\n[retention]\n{text}\n")
    with pytest.raises(ConfigError, match=problem):
        fleet_config.load(tmp_path / FLEET)
