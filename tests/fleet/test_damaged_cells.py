"""Junk in cells of a fleet's database: every reader answers in one line, whichever database holds it."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from outstation.fleet.audit.audit import audit
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.schema.message_tables import PROJECTED
from outstation.fleet.database.store import FleetStore
from outstation.foundation.errors import StorageDamaged
from outstation.workbench.testing.messages import NEW_MODEL, MessageSender, new_key
from scripts.fuzzing.malformed import CELLS, run_command
from tests.kit.fleet_databases import DATABASES, allow_nulls

TIME = "2026-11-24T22:20:00.000000Z"
COMMANDS = ("devices", "alerts --all", "audit", "gaps", "drift", "rollout status", "accept-log pi-07", "drift --json")
TEXTS = [value for value in CELLS if isinstance(value, str) and "\0" not in value]
# What one moment, the order of arrival or an operator decides, and no message states.
UNSIGNED = {("logs", "since"), ("logs", "latest")}
DERIVED = ("messages", "logs", "gaps", "anchors", "segments", "boots", "stamps", *PROJECTED)
NUMBERS = [value for value in CELLS if isinstance(value, int)]


@pytest.fixture(params=DATABASES)
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the location of a database with some messages of each kind."""
    if request.param == "sqlite":
        where: Any = tmp_path / "fleet.db"
    else:
        where = request.getfixturevalue("postgres_server").create_database()
    store = FleetStore(where)
    fill(store)
    store.close()
    return str(where)


def fill(store: FleetStore) -> None:
    sender = MessageSender("pi-07", new_key(3))
    sent = [sender.results(), sender.drift(), sender.quiet_run(), sender.alert(), sender.shadow(), sender.quality()]
    sent += [sender.rollout("shadow", numbers={"n": 3}), sender.alert(), sender.evicted((8, 8))]
    sent += [sender.health_with_cursor(), sender.results(model=NEW_MODEL), sender.results()]
    store.enrol("pi-07", sender.key.public, replace=False, now=TIME)
    store.ingest([Arrival(sender.verify(item)) for item in sent if item.seq != 8], [], TIME)


def test_junk_in_any_column_is_answered_in_one_line(location: str, tmp_path: Path) -> None:
    random = Random(4)
    assert run_command(["fleet", "init", str(tmp_path / "fleet"), "--broker", "mqtt://127.0.0.1:1"]).code == 0
    store = FleetStore(location if location.startswith("postgresql") else Path(location))
    cells = []
    with store.snapshot() as db:
        for table in ("devices", "keys", "messages", "logs", "gaps", "drift_windows", "alerts", "shadows", "metrics",
                      "quality_messages", "rollout_devices", "learned_references", "results", "stamps"):  # fmt: skip
            cursor = db.execute(f"SELECT * FROM {table}")
            names, row = [column[0] for column in cursor.description], cursor.fetchone()
            cells += [(table, name, value) for name, value in zip(names, row or (), strict=False)]
    store.close()
    answered = 0
    for table, name, value in random.sample(cells, 40):
        if not isinstance(value, str | int) or isinstance(value, bool) or name == "rowid":
            continue
        junk = random.choice(TEXTS if isinstance(value, str) else NUMBERS)
        store = FleetStore(location if location.startswith("postgresql") else Path(location))
        try:
            # A junk key may already be taken by an earlier one.
            with store.transaction() as db:
                db.execute(f'UPDATE {table} SET "{name}" = ? WHERE "{name}" = ?', (junk, value))
        except Exception as error:
            if "unique" not in str(error).lower():
                raise
            continue
        finally:
            store.close()
        words = [*random.choice(COMMANDS).split(), "--dir", str(tmp_path / "fleet"), "--db", location]
        outcome = run_command(["fleet", *words])
        assert outcome.problem == "", (table, name, junk, words, outcome)
        answered += outcome.code != 2 or "enrolled" in outcome.errors
    assert answered >= 20, "most commands do not reach the database"


def test_a_cell_of_another_type_is_named_by_the_audit(tmp_path: Path) -> None:
    """A damaged record may hold NULL where the table forbids it, and any type in a column of integers."""
    store = FleetStore(tmp_path / "fleet.db")
    fill(store)
    # An operator ends the log.
    store.enrol("pi-07", new_key(4).public, replace=True, now=TIME)
    with store.transaction() as db:
        db.execute("INSERT INTO rollouts VALUES ('r', 't', 'b', '1', 'd', 'o/f/d/t', ?, 'running', 1, '{}')", (TIME,))
        db.execute("INSERT INTO decisions VALUES ('r', 1, ?, 'started', '', '{}', x'7b7d', 'a.b.c')", (TIME,))
        db.execute("INSERT INTO desired VALUES ('o/f/d/t', 1, x'7b7d', 'a.b.c')")
    store.close()
    tables = allow_nulls(tmp_path / "fleet.db")
    store = FleetStore(tmp_path / "fleet.db")
    others = itertools.cycle(["x", b"\xff", 2.5])
    named, refused = 0, list[tuple[str, str]]()
    for table in tables:
        for name, declared in store.stream(f"SELECT name, type FROM pragma_table_info('{table}')"):
            for value in (None, "x" if declared == "INTEGER" else next(others)):
                with contextlib.suppress(RolledBack), store.transaction() as changed:
                    sql = f'UPDATE OR IGNORE {table} SET "{name}" = ? WHERE +"{name}" IS NOT ?'
                    is_changed = changed.execute(sql, (value, value)).rowcount > 0
                    try:
                        report = audit(store)
                    except StorageDamaged as error:
                        refused.append((table, str(error)))
                        raise RolledBack from None
                    json.dumps(report.to_dict())
                    if is_changed and table in DERIVED and (table, name) not in UNSIGNED:
                        is_undeclared = any(not gap["declared"] for gap in report.gaps)
                        # A log of another name has no message at all, which is a gap.
                        assert report.invalid_count or (table == "logs" and is_undeclared), (table, name, value)
                        named += 1
                    raise RolledBack
    store.close()
    assert named > 100
    # The version of the keys belongs to no message.
    assert {table for table, _ in refused} == {"meta"}
    assert all("restore the database" in problem for _, problem in refused)


def test_a_device_name_of_bytes_does_not_hide_an_unknown_device(tmp_path: Path) -> None:
    assert run_command(["fleet", "init", str(tmp_path / "fleet"), "--broker", "mqtt://127.0.0.1:1"]).code == 0
    store = FleetStore(tmp_path / "fleet.db")
    fill(store)
    with store.transaction() as db:
        db.execute("UPDATE devices SET device = x'ff'")
    store.close()
    options = ["--dir", str(tmp_path / "fleet"), "--db", str(tmp_path / "fleet.db")]
    for words in (["accept-log", "pi-07"], ["audit", "--device", "pi-07"]):
        outcome = run_command(["fleet", *words, *options])
        assert (outcome.code, outcome.problem) == (2, ""), outcome


class RolledBack(Exception):
    """Ends a transaction without a commit."""
