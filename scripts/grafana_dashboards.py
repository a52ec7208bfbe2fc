"""Grafana dashboards in deploy/grafana/: `python -m scripts.grafana_dashboards` writes them.

The panels over the fleet's database have one definition for PostgreSQL and SQLite.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from scripts.kit.usage import answer_help

FOLDER = Path(__file__).parents[1] / "deploy" / "grafana"
_COLUMNS, _HEIGHT = 2, 8
_WIDTH = 24 // _COLUMNS
_DEVICES = 'device=~"$device"'


class Panel(NamedTuple):
    """`unit` is Grafana's name of it; `legend` names the series of a query of Prometheus."""

    title: str
    kind: str
    query: str
    unit: str = "short"
    legend: str = ""


PROMETHEUS = (
    Panel("Devices by state", "stat", "sum by (state) (outstation_fleet_devices)", legend="{{state}}"),
    Panel("Open alerts", "stat", f"sum by (severity) (outstation_device_alerts_open{{{_DEVICES}}})",
          legend="{{severity}}"),
    Panel("Time since the last message", "timeseries",
          f"time() - outstation_device_last_seen_timestamp_seconds{{{_DEVICES}}}", "s", "{{device}}"),
    Panel("Messages that wait on the device", "timeseries", f"outstation_device_outbox_messages{{{_DEVICES}}}",
          legend="{{device}}"),
    Panel("Rows that tasks have not consumed", "timeseries", f"outstation_task_backlog_rows{{{_DEVICES}}}",
          legend="{{device}} {{task}}"),
    Panel("Rows accepted", "timeseries", f"rate(outstation_stream_accepted_rows_total{{{_DEVICES}}}[5m])", "rowsps",
          "{{device}} {{stream}}"),
    Panel("Rows rejected", "timeseries", f"rate(outstation_device_rejected_rows_total{{{_DEVICES}}}[5m])", "rowsps",
          "{{device}}"),
    Panel("Drift and sensor faults", "state-timeline",
          f'max by (device, task) (outstation_task_drift_state{{{_DEVICES}, state=~"drift|fault"}})',
          legend="{{device}} {{task}}"),
    Panel("Quality by labels", "timeseries", f"outstation_task_quality{{{_DEVICES}, metric=~\"accuracy|mae|auc\"}}",
          legend="{{device}} {{task}} {{output}} {{metric}}"),
    Panel("Time until the store is full", "timeseries", f"outstation_device_storage_left_seconds{{{_DEVICES}}}", "s",
          "{{device}}"),
    Panel("Temperature", "timeseries", f"outstation_device_temperature_celsius{{{_DEVICES}}}", "celsius", "{{device}}"),
    Panel("Messages stored", "timeseries", "sum by (outcome) (rate(outstation_collector_messages_total[5m]))", "cps",
          "{{outcome}}"),
    Panel("Messages refused", "timeseries", "sum by (reason) (rate(outstation_fleet_refused_messages_total[5m]))",
          "cps", "{{reason}}"),
    Panel("Messages missing", "timeseries", "outstation_fleet_missing_messages", legend="{{fleet}}"),
    Panel("Ingest lag", "timeseries", "outstation_collector_ingest_lag_seconds", "s", "{{collector}}"),
)  # fmt: skip


class Dialect(NamedTuple):
    """SQL of a data source: bounds of the time range as RFC 3339 text and as epoch seconds, and times for a graph.

    `time` and `five_minutes` have a place for a column of RFC 3339 text.
    """

    since: str
    until: str
    since_s: str
    until_s: str
    time: str
    five_minutes: str


# The variables and macros of Grafana's PostgreSQL source, and of the plugin frser-sqlite-datasource 4.
DIALECTS = {
    "postgresql": Dialect(
        "$__timeFrom()",
        "$__timeTo()",
        "CAST($__unixEpochFrom() AS BIGINT)",
        "CAST($__unixEpochTo() AS BIGINT)",
        "CAST({} AS TIMESTAMPTZ)",
        "date_bin('5 minutes', CAST({} AS TIMESTAMPTZ), TIMESTAMPTZ '2000-01-01')",
    ),
    "sqlite": Dialect(
        "strftime('%Y-%m-%dT%H:%M:%fZ', $__from / 1000, 'unixepoch')",
        "strftime('%Y-%m-%dT%H:%M:%fZ', $__to / 1000, 'unixepoch')",
        "$__from / 1000",
        "$__to / 1000",
        # The plugin parses RFC 3339.
        "{}",
        "CAST(strftime('%s', {}) AS INTEGER) / 300 * 300",
    ),
}


def database_panels(sql: Dialect) -> tuple[Panel, ...]:
    """Return the panels over the fleet's database. Times in it are RFC 3339 text, which sorts by time, or epoch µs."""
    devices = "device IN (${device:sqlstring})"
    period = f"BETWEEN {sql.since} AND {sql.until}"
    results = f"FROM results WHERE {devices} AND t BETWEEN {sql.since_s} * 1000000 AND {sql.until_s} * 1000000"
    return (
        Panel("Devices", "table", "SELECT device, state, last_seen FROM devices ORDER BY last_seen DESC NULLS LAST"),
        Panel("Alerts", "table",
              "SELECT time, device, task, severity, state, summary FROM alerts "
              f"WHERE {devices} AND time {period} ORDER BY time DESC LIMIT 500"),
        Panel("Results by label", "timeseries",
              f"SELECT t / 300000000 * 300 AS time, coalesce(label, 'value') AS metric, count(*) AS value {results} "
              "GROUP BY 1, 2 ORDER BY 1"),
        Panel("Mean score", "timeseries",
              f"SELECT t / 300000000 * 300 AS time, device AS metric, avg(score) AS value {results} "
              "AND score IS NOT NULL GROUP BY 1, 2 ORDER BY 1"),
        Panel("Drift windows", "table",
              'SELECT "to" AS time, device, task, state, n FROM drift_windows '
              f'WHERE {devices} AND "to" {period} ORDER BY "to" DESC LIMIT 500'),
        Panel("Accuracy by labels", "timeseries",
              f"SELECT {sql.time.format('time')} AS time, device || ' ' || task || ' ' || output || ' ' || metric "
              "|| CASE WHEN source = 'verdicts' THEN ' by verdicts' ELSE '' END AS metric, value "
              f"FROM metrics WHERE {devices} AND slice = '' AND time {period} ORDER BY 1"),
        Panel("Messages stored", "timeseries",
              f"SELECT {sql.five_minutes.format('received')} AS time, kind AS metric, count(*) AS value FROM messages "
              f"WHERE {devices} AND received {period} GROUP BY 1, 2 ORDER BY 1"),
        Panel("Messages missing", "table",
              "SELECT device, sum(last - first + 1) AS messages, declared AS evicted FROM gaps "
              f"WHERE {devices} GROUP BY device, declared ORDER BY device"),
        Panel("Messages refused", "table",
              "SELECT device, reason, count, last FROM refusals ORDER BY last DESC LIMIT 500"),
    )  # fmt: skip


_DATABASE_DEVICES = "SELECT device FROM devices ORDER BY device"
# Dashboard → Grafana's type of its data source, panels, and the query of the devices to choose.
DASHBOARDS = {
    "prometheus": ("prometheus", PROMETHEUS, "label_values(outstation_device_up, device)"),
    "postgresql": ("grafana-postgresql-datasource", database_panels(DIALECTS["postgresql"]), _DATABASE_DEVICES),
    "sqlite": ("frser-sqlite-datasource", database_panels(DIALECTS["sqlite"]), _DATABASE_DEVICES),
}


def build(source: str) -> dict[str, Any]:
    """Return the dashboard `source` as Grafana imports it."""
    grafana_type, panels, device_query = DASHBOARDS[source]
    used = {"type": grafana_type, "uid": "${source}"}
    device = {
        "name": "device", "type": "query", "datasource": used, "query": device_query, "refresh": 2,
        "multi": True, "includeAll": True, "current": {"text": "All", "value": "$__all"},
    }  # fmt: skip
    choice = {"name": "source", "type": "datasource", "query": grafana_type}
    return {
        "title": f"Outstation fleet ({source})",
        "uid": f"outstation-{source}",
        "tags": ["outstation"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-24h", "to": "now"},
        "templating": {"list": [choice, device]},
        "panels": [_build_panel(number, panel, used) for number, panel in enumerate(panels)],
    }


def _build_panel(number: int, panel: Panel, source: dict[str, str]) -> dict[str, Any]:
    target: dict[str, Any] = {"refId": "A", "datasource": source}
    if source["type"] == "prometheus":
        target |= {"expr": panel.query, "legendFormat": panel.legend}
    elif source["type"] == "frser-sqlite-datasource":
        layout = "table" if panel.kind == "table" else "time series"
        target |= {"rawQueryText": panel.query, "queryText": panel.query, "queryType": layout, "timeColumns": ["time"]}
    else:
        layout = "table" if panel.kind == "table" else "time_series"
        target |= {"rawSql": panel.query, "rawQuery": True, "format": layout}
    row, column = divmod(number, _COLUMNS)
    return {
        "id": number + 1,
        "title": panel.title,
        "type": panel.kind,
        "datasource": source,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [target],
    }


def render() -> dict[Path, str]:
    """Return the text of each file."""
    return {FOLDER / f"{source}.json": json.dumps(build(source), indent=2) + "\n" for source in DASHBOARDS}


if __name__ == "__main__":
    answer_help(__doc__)
    for file, text in render().items():
        file.write_text(text, encoding="utf-8")
        print(file)
