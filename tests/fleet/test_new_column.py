"""A version whose `results` have a further column opens the database of this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.schema.migrations import MIGRATIONS
from outstation.fleet.database.store import FleetStore
from outstation.workbench.testing.messages import MessageSender

NOW = "2026-11-24T12:00:00Z"
NEWER_VERSION = f"""
import sys
from pathlib import Path
import msgspec
from outstation.fleet.database.schema import message_tables

columns = *message_tables.RESULTS.columns, message_tables.Column(
    "margin", "real", "score without that of the next label", "1", is_optional=True, added={len(MIGRATIONS) + 1}
)
results = msgspec.structs.replace(message_tables.RESULTS, columns=columns)
message_tables.RESULTS = message_tables.TABLES["results"] = message_tables.PROJECTED["results"] = results

from outstation.fleet.database.store import FleetStore
from outstation.fleet.export.tables import KINDS

place = sys.argv[1]
store = FleetStore(place if "://" in place else Path(place))
with store.transaction() as db:
    db.execute("UPDATE results SET margin = row")
    print([*db.execute("SELECT device, row, t_best = t, margin, model FROM results_dated ORDER BY row")])
print("margin" in KINDS["results"].names)
store.close()
"""


# Its schema is that of modules which another process has not imported yet.
@pytest.mark.exec
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_the_column_is_added_to_the_table_the_view_and_exports(
    tmp_path: Path, request: pytest.FixtureRequest, database: str
) -> None:
    place = tmp_path / "fleet.db" if database == "sqlite" else request.getfixturevalue("postgres_url")
    store, sender = FleetStore(place), MessageSender()
    store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
    store.ingest([Arrival(sender.verify(sender.results(2)))], [], NOW)
    with store.transaction() as db:
        rows = [row for (row,) in db.execute("SELECT row FROM results ORDER BY row")]
    store.close()
    command = [sys.executable, "-c", NEWER_VERSION, str(place)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    is_equal = 1 if database == "sqlite" else True
    expected = [(sender.device, row, is_equal, float(row), "exercise") for row in rows]
    assert answer.stdout.splitlines() == [str(expected), "True"]
