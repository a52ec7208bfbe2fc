"""Grafana dashboards: a real Prometheus and a real PostgreSQL run every panel and find something."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from agent import clock
from agent.fleet.collector.quota import Quota
from agent.fleet.collector.statistics import CollectorStatistics
from agent.fleet.config import MetricsConfig
from agent.fleet.database.ingest import Arrival, Refusal
from agent.fleet.database.store import FleetStore
from agent.fleet.metrics.collector_families import build_families
from agent.fleet.metrics.endpoint import MetricsListener
from agent.fleet.metrics.exporter import DatabaseExporter
from agent.testing.messages import FLEET
from agent.testing.process import wait_until
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
    now = clock.to_rfc3339(clock.read().wall_us)
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


def test_postgresql_answers_every_panel() -> None:
    with run_server() as server:
        url = server.create_database()
        store = FleetStore(url)
        fill(store)
        store.close()
        year_s = 365 * 86_400
        # Messages of the test kit have fixed times.
        since, until = int(time.time()) - 5 * year_s, int(time.time()) + 5 * year_s
        macros = {
            "$__timeFrom()": f"'{clock.to_rfc3339(since * 1_000_000)}'",
            "$__timeTo()": f"'{clock.to_rfc3339(until * 1_000_000)}'",
            "$__unixEpochFrom()": str(since),
            "$__unixEpochTo()": str(until),
            "$device": "'pi-07'",
        }
        dashboard = load("postgresql")
        queries = {panel["title"]: panel["targets"][0]["rawSql"] for panel in dashboard["panels"]}
        queries["devices to choose"] = dashboard["templating"]["list"][1]["query"]
        with psycopg.connect(url) as connection:
            for title, query in queries.items():
                for macro, text in macros.items():
                    query = query.replace(macro, text)
                assert "$" not in query
                rows = connection.execute(query).fetchall()
                assert rows or title in MAY_BE_EMPTY, f"{title}: {query}"
