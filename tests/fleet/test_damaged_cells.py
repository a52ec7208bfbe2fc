"""Junk in cells of a fleet's database: every reader answers in one line, whichever database holds it."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from agent.fleet.database.ingest import Arrival
from agent.fleet.database.store import FleetStore
from agent.testing.messages import NEW_MODEL, MessageSender, new_key
from scripts.fuzzing.malformed import CELLS, run_command
from tests.kit.fleet_databases import DATABASES

TIME = "2026-11-24T22:20:00.000000Z"
COMMANDS = ("devices", "alerts --all", "audit", "gaps", "drift", "rollout status", "accept-log pi-07", "drift --json")
TEXTS = [value for value in CELLS if isinstance(value, str) and "\0" not in value]
NUMBERS = [value for value in CELLS if isinstance(value, int)]


@pytest.fixture(params=DATABASES)
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the location of a database with some messages of each kind."""
    if request.param == "sqlite":
        where: Any = tmp_path / "fleet.db"
    else:
        where = request.getfixturevalue("postgres_server").create_database()
    sender = MessageSender("pi-07", new_key(3))
    sent = [sender.results(), sender.drift(), sender.quiet_run(), sender.alert(), sender.shadow(), sender.quality()]
    sent += [sender.rollout("shadow", numbers={"n": 3}), sender.evicted((9, 9)), sender.health_with_cursor()]
    sent += [sender.results(model=NEW_MODEL), sender.results()]
    store = FleetStore(where)
    store.enrol("pi-07", sender.key.public, replace=False, now=TIME)
    store.ingest([Arrival(sender.verify(item)) for item in sent if item.seq != 9], [], TIME)
    store.close()
    return str(where)


def test_junk_in_any_column_is_answered_in_one_line(location: str, tmp_path: Path) -> None:
    random = Random(4)
    assert run_command(["fleet", "init", str(tmp_path / "fleet"), "--broker", "mqtt://127.0.0.1:1"]).code == 0
    store = FleetStore(location if location.startswith("postgresql") else Path(location))
    cells = []
    with store.snapshot() as db:
        for table in ("devices", "keys", "messages", "logs", "gaps", "drift_windows", "alerts", "shadows", "metrics",
                      "quality_messages", "rollout_devices", "results", "stamps"):  # fmt: skip
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
