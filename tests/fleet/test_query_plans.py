"""Plans of all queries but the audit's: each reads by an index what it needs of tables that grow, in both databases."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from outstation.fleet.database import postgresql_rows, sqlite
from outstation.fleet.database.store import FleetStore
from scripts.benchmarks import fleet_queries

# Tables that grow with the messages.
LARGE = frozenset(
    {
        *("messages", "results", "drift_windows", "alerts", "incidents", "metrics", "quality_messages", "anchors"),
        *("rollout_devices", "result_details", "result_messages", "learned_references", "stamps"),
    }
)
# Indexes of a few rows, or of what one query needs and nothing else; and what only a few devices have.
SMALL_INDEXES = frozenset(
    {"incidents_raised", "incidents_by_time", "incidents_by_ref", "incidents_drift", "drift_windows_by_time"}
)
SMALL_TABLES = frozenset({"learned_references"})

Statement = tuple[str, Any]


def recorded(store: FleetStore) -> list[Statement]:
    """Return each statement that the queries run, with the values of its first time."""
    statements: dict[str, Any] = {}

    def record(original: Any) -> Any:
        def run(self: Any, sql: str, values: Any = ()) -> Any:
            statements.setdefault(sql, values)
            return original(self, sql, values)

        return run

    def record_each(original: Any) -> Any:
        def run(self: Any, sql: str, rows: Any) -> Any:
            listed = [*rows]
            statements.update({sql: listed[0]} if listed and sql not in statements else {})
            return original(self, sql, listed)

        return run

    with contextlib.ExitStack() as patches:
        for kind in (sqlite.SqliteConnection, postgresql_rows.PostgresqlConnection):
            for name, wrap in (("execute", record), ("execute_each", record_each)):
                patches.enter_context(mock.patch.object(kind, name, wrap(getattr(kind, name))))
        fleet_queries.run_queries(store)
        store.devices()
        store.alerts()
    return [(sql, values) for sql, values in statements.items() if sql.lstrip().startswith(("SELECT", "WITH"))]


def test_no_query_reads_a_large_table_as_a_whole_in_sqlite(tmp_path: Path) -> None:
    location = str(tmp_path / "fleet.db")
    fleet_queries.generate(location, 40_000, 5)
    store = FleetStore(location)
    statements = recorded(store)
    assert len(statements) > 45
    problems = []
    with store.snapshot() as db:
        for sql, values in statements:
            for _, _, _, step in db.execute(f"EXPLAIN QUERY PLAN {sql}", values):
                words = step.split()
                table = _aliases(sql).get(words[1], words[1]) if len(words) > 1 else ""
                if words[0] == "SCAN" and table in LARGE - SMALL_TABLES and words[-1] not in SMALL_INDEXES:
                    problems.append((step, sql))
    store.close()
    assert problems == []


def test_no_query_reads_a_large_table_as_a_whole_in_postgresql(postgres_url: str) -> None:
    fleet_queries.generate(postgres_url, 40_000, 5)
    store = FleetStore(postgres_url)
    statements = recorded(store)
    assert len(statements) > 45
    problems = []
    with store.snapshot() as db:
        # Else small tables are read as a whole, which is faster.
        db.execute("SET LOCAL enable_seqscan = off")
        for sql, values in statements:
            plan = db.execute(f"EXPLAIN (FORMAT JSON) {sql}", values).fetchone()[0]
            root = (json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]
            problems += [(problem, sql) for problem in _find_scans(root, is_limited=False)]
    store.close()
    assert problems == []


def _aliases(sql: str) -> dict[str, str]:
    """Return alias → table of a statement."""
    words = sql.replace("(", " ").replace(")", " ").split()
    places = [i for i, word in enumerate(words) if word in ("FROM", "JOIN") and i + 2 < len(words)]
    return {words[i + 2]: words[i + 1] for i in places}


def _find_scans(node: dict[str, Any], *, is_limited: bool) -> Iterator[str]:
    """Yield the nodes of a plan that read all rows of a large table, or all entries of a large index."""
    table, index = node.get("Relation Name", ""), node.get("Index Name", "")
    base = table.rstrip("0123456789").rstrip("_")
    is_limited = is_limited or node["Node Type"] == "Limit"
    if base in LARGE - SMALL_TABLES and "Index Cond" not in node and "Recheck Cond" not in node:
        is_scan = node["Node Type"] == "Seq Scan" or (not is_limited and index not in SMALL_INDEXES)
        if is_scan:
            yield f"{node['Node Type']} {index} on {table}"
    for child in node.get("Plans", ()):
        yield from _find_scans(child, is_limited=is_limited)
