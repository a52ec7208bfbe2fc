"""Grafana dashboards: a real Prometheus, PostgreSQL and SQLite run every panel and find something."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outstation.fleet.collector.quota import Quota
from outstation.fleet.collector.statistics import CollectorStatistics
from outstation.fleet.config import MetricsConfig
from outstation.fleet.database.ingest import Arrival, Refusal
from outstation.fleet.database.store import FleetStore
from outstation.fleet.metrics.collector_families import build_families
from outstation.fleet.metrics.endpoint import MetricsListener
from outstation.fleet.metrics.exporter import DatabaseExporter
from outstation.foundation import clock
from outstation.workbench.testing.messages import FLEET, MODEL
from outstation.workbench.testing.patience import wait_until
from scripts.grafana_dashboards import render
from scripts.interops.prometheus import PrometheusServer
from scripts.kit.postgres import run_server
from tests.kit.dashboards import enrolled, health

FOLDER = Path(__file__).parents[3] / "deploy" / "grafana"
# Grafana sends a query of these panels for what this fleet does not have: labels, and missing messages.
MAY_BE_EMPTY = {"Accuracy by labels", "Messages missing"}


def load(source: str) -> Any:
    return json.loads((FOLDER / f"{source}.json").read_text())


def fill(store: FleetStore) -> None:
    """Store each kind of message of one device, and a refused one."""
    sender = enrolled(store, "pi-07", 7)
    messages = [sender.results(), sender.drift("drift"), health(sender, throttle={"temperature": 50.0})]
    messages.append(sender.alert("exercise/ax/drift/1"))
    running = {sender.task: {"row": 1, "stream": "watch", "model": MODEL}}
    metric = {"metric": "accuracy", "value": 0.9, "low": 0.8, "high": 0.95, "n": 50}
    messages.append(sender.append("quality", task=sender.task, model=MODEL, window={"n": 50}, metrics=[metric]))
    messages.append(health(sender, throttle={"temperature": 50.0}, tasks=running))
    now = clock.now_rfc3339()
    store.ingest([Arrival(sender.verify(m)) for m in messages], [Refusal("pi-07", "unsigned", "", "t", b"", "")], now)


@pytest.mark.parametrize("file", render(), ids=lambda file: file.name)
def test_the_files_are_what_the_script_writes(file: Path) -> None:
    assert file.read_text() == render()[file]
    panels = json.loads(file.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 9


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[PrometheusServer]:
    store = FleetStore(tmp_path / "fleet.db")
    fill(store)
    statistics = CollectorStatistics()
    exporter = DatabaseExporter(FLEET, str(store.location), lambda: build_families(FLEET, "", statistics, Quota()))
    listener = MetricsListener(MetricsConfig(listen="127.0.0.1:0"), exporter)
    listener.start()
    try:
        with PrometheusServer(tmp_path / "prometheus", [f"127.0.0.1:{listener.address[1]}"]).running() as server:
            yield server
    finally:
        listener.stop()
        store.close()


def test_prometheus_answers_every_panel(prometheus: PrometheusServer) -> None:
    # A rate needs two scrapes.
    scraped = "count_over_time(outstation_database_up[1m]) > 2"
    wait_until("Prometheus scraped the exporter", lambda: prometheus.query(scraped))
    for panel in load("prometheus")["panels"]:
        for device in ("pi-07", ".*"):
            query = panel["targets"][0]["expr"].replace("$device", device)
            assert prometheus.query(query), f"{panel['title']}: {query}"


YEAR_S = 365 * 86_400
# Messages of the test kit have fixed times.
SINCE_S, UNTIL_S = int(time.time()) - 5 * YEAR_S, int(time.time()) + 5 * YEAR_S
MACROS = {
    "postgresql": {
        "$__timeFrom()": f"'{clock.to_rfc3339(SINCE_S * 1_000_000)}'",
        "$__timeTo()": f"'{clock.to_rfc3339(UNTIL_S * 1_000_000)}'",
        "$__unixEpochFrom()": str(SINCE_S),
        "$__unixEpochTo()": str(UNTIL_S),
    },
    "sqlite": {"$__from": str(SINCE_S * 1000), "$__to": str(UNTIL_S * 1000)},
}


def check_panels(source: str, run: Callable[[str], Sequence[Sequence[Any]]]) -> None:
    """Run the query of each panel as Grafana sends it, and look at the times that a graph needs."""
    dashboard = load(source)
    for panel in [*dashboard["panels"], {"title": "devices to choose", "type": "", "targets": []}]:
        target = panel["targets"][0] if panel["targets"] else {"rawSql": dashboard["templating"]["list"][1]["query"]}
        query = target.get("rawSql") or target["rawQueryText"]
        for macro, text in {**MACROS[source], "${device:sqlstring}": "'pi-07','it''s'"}.items():
            query = query.replace(macro, text)
        assert "$" not in query
        rows = run(query)
        assert rows or panel["title"] in MAY_BE_EMPTY, f"{panel['title']}: {query}"
        if panel["type"] == "timeseries" and rows:
            times = [row[0].timestamp() if isinstance(row[0], datetime) else row[0] for row in rows]
            assert times == sorted(times)
            assert all(isinstance(at, int | float | str) and (isinstance(at, str) or at > 10**9) for at in times)
            assert all(len(row) == 3 and isinstance(row[1], str) for row in rows)


def test_postgresql_answers_every_panel() -> None:
    with run_server() as server:
        url = server.create_database()
        store = FleetStore(url)
        fill(store)
        store.close()
        with psycopg.connect(url) as connection:
            check_panels("postgresql", lambda query: connection.execute(query.encode()).fetchall())


def test_sqlite_answers_every_panel(tmp_path: Path) -> None:
    file = tmp_path / "fleet.db"
    store = FleetStore(file)
    fill(store)
    store.close()
    # As the plugin opens it with the path option `mode=ro`.
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        check_panels("sqlite", lambda query: connection.execute(query).fetchall())
        # A period without messages finds none: its bounds are compared with what is stored.
        titles = {"Results by label", "Messages stored", "Alerts", "Drift windows"}
        for panel in (panel for panel in load("sqlite")["panels"] if panel["title"] in titles):
            query = panel["targets"][0]["rawQueryText"].replace("${device:sqlstring}", "'pi-07'")
            for macro, at_s in (("$__from", SINCE_S), ("$__to", SINCE_S + 60)):
                query = query.replace(macro, str(at_s * 1000))
            assert connection.execute(query).fetchall() == [], panel["title"]
