"""The page about exports: its examples answer their questions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.export.export import export
from outstation.fleet.export.query import ExportQueries
from outstation.fleet.export.tables import Filters
from outstation.foundation import clock
from outstation.workbench.testing.messages import FLEET, MessageSender, new_key

TEXT = (Path(__file__).parents[3] / "docs" / "guides" / "export.md").read_text(encoding="utf-8")
DAY_US = 86_400_000_000
LAST = clock.parse_rfc3339("2026-11-24T12:00:00Z")


def test_the_example_lists_devices_with_drift_and_lower_accuracy(tmp_path: Path) -> None:
    store = FleetStore(tmp_path / "fleet.db")

    def at(days: float) -> str:
        return clock.to_rfc3339(LAST + int(days * DAY_US))

    def report(device: str, drifts: list[float], accuracies: list[tuple[float, float]]) -> None:
        sender = MessageSender(device)
        store.enrol(device, sender.key.public, replace=False, now=at(0))
        sent = []
        for day in drifts:
            window = {"index": 1, "rows": [1, 2000], "from": at(day - 0.1), "to": at(day), "n": 2000}
            sent.append(sender.drift("drift", window=window, time=at(day)))
        for day, value in accuracies:
            metric: dict[str, Any] = {"metric": "accuracy", "value": value, "low": value - 0.02, "high": value + 0.02}
            sent.append(sender.append("quality", task=sender.task, metrics=[{**metric, "n": 900}], time=at(day)))
        store.ingest([Arrival(sender.verify(item)) for item in sent], [], at(0))

    report("pi-followed", [-3, -2], [(-9, 0.5), (-5, 0.95), (-1, 0.8)])
    report("pi-steady", [-4], [(-5, 0.95), (-1, 0.94)])
    report("pi-unlabelled", [0], [])
    report("pi-earlier", [-20], [(-30, 0.95), (-1, 0.5)])
    export(store, tmp_path / "export", FLEET, Filters(), new_key(99))
    store.close()
    [query] = re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL)
    queries = ExportQueries(tmp_path / "export")
    names, rows = queries.query(query)
    answers = [dict(zip(names, row, strict=True)) for row in rows]
    queries.close()
    assert [(row["device"], row["windows"], row["accuracy_before"], row["accuracy_since"], row["followed"])
            for row in answers] == [
        ("pi-followed", 2, 0.95, 0.8, True),
        ("pi-steady", 1, 0.95, 0.94, False),
        ("pi-unlabelled", 1, None, None, None),
    ]  # fmt: skip


def test_pandas_reads_the_export_as_the_page_says(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    store, sender = FleetStore(tmp_path / "fleet.db"), MessageSender()
    store.enrol(sender.device, sender.key.public, replace=False, now=clock.to_rfc3339(LAST))
    sent = [sender.results(2), sender.results(2, faults=["ax"])]
    store.ingest([Arrival(sender.verify(item)) for item in sent], [], clock.to_rfc3339(LAST))
    export(store, tmp_path / "export", FLEET, Filters(), new_key(99))
    store.close()
    results = pandas.read_parquet(tmp_path / "export" / "kind=results")
    assert results[results.faults.isna()].groupby("device", observed=True).score.mean().to_dict() == {"pi-07": 0.625}
