"""`/metrics` of the dashboard and of a collector: numbers, who may read them, hostile devices, and their cost."""

from __future__ import annotations

import http.client
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Route

from outstation.fleet.collector.quota import Quota
from outstation.fleet.collector.statistics import CollectorStatistics
from outstation.fleet.config import MetricsConfig
from outstation.fleet.dashboard.pages.visit import Dashboard
from outstation.fleet.dashboard.security.access import AccessPolicy
from outstation.fleet.database.ingest import Arrival, Refusal
from outstation.fleet.database.store import FleetStore
from outstation.fleet.metrics import exporter as exporting
from outstation.fleet.metrics.collector_families import build_families
from outstation.fleet.metrics.endpoint import MetricsListener, dashboard_route
from outstation.fleet.metrics.exporter import DatabaseExporter
from outstation.foundation import clock
from outstation.foundation.errors import ConfigError
from outstation.workbench.testing.messages import FLEET, MODEL, NEW_MODEL, MessageSender, SignedMessage
from tests.kit.dashboards import ServedDashboard, enrolled, health, served, wait_until_shown

TOKEN = "t" * 40
HOSTILE = 'x"}\n# HELP evil 1\u202e\x1b[31m'


def check_with_promtool(text: str) -> None:
    """Let promtool parse and lint the metrics."""
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def parse(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the samples as (name, labels without the fleet) → value."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(s.name, frozenset(s.labels.items()) - {("fleet", FLEET)}): s.value for s in samples}


def value(text: str, name: str, **labels: str) -> float | None:
    return parse(text).get((name, frozenset(labels.items())))


def with_token(dashboard: Dashboard) -> list[Route]:
    return [dashboard_route(dashboard, TOKEN.encode())]


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDashboard]:
    with served(tmp_path_factory.mktemp("fleet") / "acme", routes=with_token) as running:
        wait_until_shown(running, "/fleet", "gain loss")
        yield running


def test_the_dashboard_serves_state_backlog_drift_and_alerts_of_each_device(dashboard: ServedDashboard) -> None:
    answer = dashboard.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    check_with_promtool(answer.text)
    assert value(answer.text, "outstation_device_outbox_messages", device="pi-07") == 3
    assert value(answer.text, "outstation_device_storage_left_seconds", device="pi-07") == 71.5 * 3600
    assert value(answer.text, "outstation_task_drift_state", device="pi-07", task="exercise", state="drift") == 1
    assert value(answer.text, "outstation_task_drift_state", device="pi-07", task="exercise", state="ok") == 0
    seen = value(answer.text, "outstation_device_last_seen_timestamp_seconds", device="pi-07")
    assert seen == pytest.approx(time.time(), abs=60)
    assert sum(v for (name, _), v in parse(answer.text).items() if name == "outstation_device_alerts_open") == 1
    assert value(answer.text, "outstation_database_up") == 1


def test_a_dashboard_that_asks_for_a_sign_in_gives_metrics_to_the_token_only(tmp_path: Path) -> None:
    policy = AccessPolicy(b"s" * 32, "")
    with served(tmp_path / "acme", policy=policy, routes=with_token) as closed:
        for authorization in ("-", "Bearer ", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \u00e9"):
            assert closed.get("/metrics", authorization=authorization).status == 401, authorization
        assert closed.get("/metrics", authorization=f"Bearer {TOKEN}").status == 200
        assert closed.get("/metrics", closed.sign_in("vera")).status == 200


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FleetStore]:
    with FleetStore(tmp_path / "fleet.db") as opened:
        yield opened


def fetch(listener: MetricsListener, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*listener.address, timeout=20)
    connection.request("GET", "/metrics", headers=headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


@pytest.fixture
def listener(store: FleetStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MetricsListener]:
    monkeypatch.setattr(exporting, "MIN_INTERVAL_S", 0.0)
    statistics = CollectorStatistics()
    statistics.outcomes.update(["new", "new", "duplicate"])
    statistics.refusals.update(f"reason {i}" for i in range(200))
    statistics.set_held(7, clock.boot_seconds() - 5)
    own = DatabaseExporter(FLEET, str(store.location), lambda: build_families(FLEET, "", statistics, Quota()))
    (tmp_path / "token").write_text(TOKEN + "\n")
    started = MetricsListener(MetricsConfig(listen="127.0.0.1:0", token_file=str(tmp_path / "token")), own)
    started.start()
    yield started
    started.stop()


def ingest(store: FleetStore, sender: Any, *sent: Any) -> None:
    now = clock.now_rfc3339()
    store.ingest([Arrival(sender.verify(item)) for item in sent], [Refusal(HOSTILE, "unsigned", "", "t", b"", "")], now)


def test_a_collector_serves_what_it_accepted_refused_and_holds(store: FleetStore, listener: MetricsListener) -> None:
    sender = enrolled(store, "pi-01")
    ingest(store, sender, sender.results(), health(sender))
    status, text = fetch(listener)
    assert status == 200
    check_with_promtool(text)
    assert value(text, "outstation_collector_messages_total", collector="", outcome="new") == 2
    assert value(text, "outstation_collector_held_messages", collector="") == 7
    lag = value(text, "outstation_collector_ingest_lag_seconds", collector="")
    assert lag == pytest.approx(5, abs=30)
    assert value(text, "outstation_fleet_refused_messages_total", reason="unsigned") == 1
    name = "outstation_collector_refused_messages_total"
    refused = [n for (metric, _), n in parse(text).items() if metric == name]
    assert len(refused) == 51
    assert sum(refused) == 200


def test_a_hostile_device_adds_no_label_and_no_wrong_number(store: FleetStore, listener: MetricsListener) -> None:
    sender = enrolled(store, "pi-02")
    model = {"name": HOSTILE * 9}
    tasks: dict[str, Any] = {f"task-{i}": {"row": i, "stream": "s", "model": model} for i in range(500)}
    tasks = {HOSTILE: {"row": 1}, **tasks}
    streams = {HOSTILE: {"rows": 1}, **{f"stream-{i}": {"rows": -1} for i in range(500)}}
    odd = {"bytes": "many", "max": -5.5, "hours": 1e308}
    body: dict[str, Any] = {
        "outbox": "many",
        "tasks": tasks,
        "streams": streams,
        "store": odd,
        "rejected": True,
        "agent": "x" * 900,
    }
    ingest(store, sender, health(sender, **body))
    status, text = fetch(listener)
    assert status == 200
    check_with_promtool(text)
    assert len({dict(labels)["task"] for _, labels in parse(text) if "task" in dict(labels)}) <= 32
    for name in ("outbox_messages", "storage_used_bytes", "storage_left_seconds", "rejected_rows_total"):
        assert value(text, f"outstation_device_{name}", device="pi-02") is None
    assert "evil" not in {name for name, _ in parse(text)}


def measured(sender: MessageSender, output: str, *names: str, slice_name: str = "", **changes: Any) -> SignedMessage:
    metrics = [{"metric": name, "value": 0.9, "low": 0.8, "high": None, "n": 50, "slice": slice_name} for name in names]
    members = {"output": output} if output else {}
    body = {"model": MODEL, "window": {"n": 50}, "metrics": metrics, **members, **changes}
    return sender.append("quality", task=sender.task, **body)


def quality_of(text: str) -> dict[tuple[str, str], float]:
    samples = {labels: number for (name, labels), number in parse(text).items() if name == "outstation_task_quality"}
    return {(dict(labels).get("output", ""), dict(labels)["metric"]): number for labels, number in samples.items()}


def test_quality_of_each_output_is_served_with_its_interval_and_age(
    store: FleetStore, listener: MetricsListener
) -> None:
    sender = enrolled(store, "pi-01")
    running = health(sender, tasks={sender.task: {"row": 1, "stream": "watch", "model": MODEL}})
    ingest(store, sender, running, measured(sender, "", "accuracy", "ece_chance"), measured(sender, "wear", "mae"))
    text = fetch(listener)[1]
    check_with_promtool(text)
    assert quality_of(text) == {("", "accuracy"): 0.9, ("", "ece_chance"): 0.9, ("wear", "mae"): 0.9}
    where = {"device": "pi-01", "task": sender.task, "output": "wear"}
    assert value(text, "outstation_task_quality_low", metric="mae", **where) == 0.8
    assert value(text, "outstation_task_quality_high", metric="mae", **where) is None
    assert value(text, "outstation_task_quality_labels", **where) == 50
    assert value(text, "outstation_task_quality_timestamp_seconds", **where) is not None
    ingest(store, sender, measured(sender, "wear", "rmse"))
    assert quality_of(fetch(listener)[1])["wear", "rmse"] == 0.9
    ingest(store, sender, health(sender, tasks={sender.task: {"row": 1, "stream": "watch", "model": NEW_MODEL}}))
    assert quality_of(fetch(listener)[1]) == {}, "metrics are of the bundle that runs"


def test_quality_of_a_new_task_is_served(store: FleetStore, listener: MetricsListener) -> None:
    sender = enrolled(store, "pi-05")
    ingest(store, sender, health(sender, tasks={}), measured(sender, "", "accuracy"))
    assert quality_of(fetch(listener)[1]) == {}
    ingest(store, sender, health(sender, tasks={sender.task: {"row": 1, "stream": "watch", "model": MODEL}}))
    assert quality_of(fetch(listener)[1]) == {("", "accuracy"): 0.9}


@pytest.mark.attack("devices")
def test_a_device_that_claims_many_outputs_and_metrics_gets_a_bounded_number_of_series(
    store: FleetStore, listener: MetricsListener
) -> None:
    sender = enrolled(store, "pi-04")
    names = ["accuracy", *(f"metric-{i}" for i in range(40))]
    claims = [measured(sender, f"o{i:03}", *names) for i in range(90)]
    sliced = measured(sender, "", "accuracy", slice_name="room=1")
    tasks = {sender.task: {"row": 1, "stream": "watch", "model": MODEL}}
    ingest(store, sender, health(sender, tasks=tasks), *claims, sliced)
    samples = quality_of(fetch(listener)[1])
    assert {metric for _, metric in samples} == {"accuracy"}
    assert len(samples) == 60


def test_an_unavailable_database_is_reported_until_it_returns(store: FleetStore, listener: MetricsListener) -> None:
    enrolled(store, "pi-03")
    assert value(fetch(listener)[1], "outstation_device_up", device="pi-03") == 0
    path = Path(store.location)
    hidden = path.rename(path.with_suffix(".hidden"))
    status, text = fetch(listener)
    assert (status, value(text, "outstation_database_up")) == (200, 0)
    assert value(text, "outstation_device_up", device="pi-03") == 0
    hidden.rename(path)
    assert value(fetch(listener)[1], "outstation_database_up") == 1


def test_a_proxied_request_needs_the_token(listener: MetricsListener) -> None:
    assert fetch(listener, **{"x-forwarded-for": "192.0.2.1"})[0] == 401
    assert fetch(listener, host="evil.example.org")[0] == 401
    assert fetch(listener, host="evil.example.org", authorization=f"Bearer {TOKEN}")[0] == 200


def test_an_address_that_others_reach_needs_a_token(store: FleetStore, tmp_path: Path) -> None:
    own = DatabaseExporter(FLEET, str(store.location), list)
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0:0 is reachable from other machines"):
        MetricsListener(MetricsConfig(listen="0.0.0.0:0"), own)
    (tmp_path / "token").write_text("short")
    with pytest.raises(ConfigError, match="holds 5 characters"):
        MetricsListener(MetricsConfig(listen="127.0.0.1:0", token_file=str(tmp_path / "token")), own)


def test_many_scrapes_read_the_database_once(store: FleetStore) -> None:
    reads = []
    own = DatabaseExporter(FLEET, str(store.location), lambda: reads.append(1) or ())  # type: ignore[func-returns-value]
    assert own.read() is own.read() is own.read()
    own.close()
    assert reads == [1]
