"""Grafana dashboards in deploy/grafana/ for Prometheus and PostgreSQL: `python -m scripts.grafana_dashboards`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[1] / "deploy" / "grafana"
_COLUMNS, _HEIGHT = 2, 8
_WIDTH = 24 // _COLUMNS
_DEVICES = 'device=~"$device"'
_PERIOD = "BETWEEN $__timeFrom() AND $__timeTo()"


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

# Times are RFC 3339 text, which sorts by time, or microseconds since 1970.
_RESULTS = (
    "FROM results WHERE device IN ($device) AND t BETWEEN CAST($__unixEpochFrom() AS BIGINT) * 1000000 "
    "AND CAST($__unixEpochTo() AS BIGINT) * 1000000"
)
POSTGRESQL = (
    Panel("Devices", "table", "SELECT device, state, last_seen FROM devices ORDER BY last_seen DESC NULLS LAST"),
    Panel("Alerts", "table",
          "SELECT time, device, task, severity, state, summary FROM alerts "
          f"WHERE device IN ($device) AND time {_PERIOD} ORDER BY time DESC LIMIT 500"),
    Panel("Results by label", "timeseries",
          f"SELECT t / 300000000 * 300 AS time, coalesce(label, 'value') AS metric, count(*) AS value {_RESULTS} "
          "GROUP BY 1, 2 ORDER BY 1"),
    Panel("Mean score", "timeseries",
          f"SELECT t / 300000000 * 300 AS time, device AS metric, avg(score) AS value {_RESULTS} "
          "AND score IS NOT NULL GROUP BY 1, 2 ORDER BY 1"),
    Panel("Drift windows", "table",
          'SELECT "to" AS time, device, task, state, n FROM drift_windows '
          f'WHERE device IN ($device) AND "to" {_PERIOD} ORDER BY "to" DESC LIMIT 500'),
    Panel("Accuracy by labels", "timeseries",
          "SELECT CAST(time AS TIMESTAMPTZ) AS time, device || ' ' || task || ' ' || metric "
          "|| CASE WHEN source = 'verdicts' THEN ' by verdicts' ELSE '' END AS metric, value "
          f"FROM metrics WHERE device IN ($device) AND slice = '' AND time {_PERIOD} ORDER BY 1"),
    Panel("Messages stored", "timeseries",
          "SELECT date_bin('5 minutes', CAST(received AS TIMESTAMPTZ), TIMESTAMPTZ '2000-01-01') AS time, "
          "kind AS metric, count(*) AS value FROM messages "
          f"WHERE device IN ($device) AND received {_PERIOD} GROUP BY 1, 2 ORDER BY 1"),
    Panel("Messages missing", "table",
          "SELECT device, sum(last - first + 1) AS messages, declared AS evicted FROM gaps "
          "WHERE device IN ($device) GROUP BY device, declared ORDER BY device"),
    Panel("Messages refused", "table", "SELECT device, reason, count, last FROM refusals ORDER BY last DESC LIMIT 500"),
)  # fmt: skip

DEVICE_QUERIES = {
    "prometheus": "label_values(outstation_device_up, device)",
    "postgresql": "SELECT device FROM devices ORDER BY device",
}


def build(source: str, panels: tuple[Panel, ...]) -> dict[str, Any]:
    """Return the dashboard for a data source of type `source`, as Grafana imports it."""
    grafana_type = {"prometheus": "prometheus", "postgresql": "grafana-postgresql-datasource"}[source]
    used = {"type": grafana_type, "uid": "${source}"}
    device = {
        "name": "device", "type": "query", "datasource": used, "query": DEVICE_QUERIES[source], "refresh": 2,
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
    dashboards = {"prometheus": PROMETHEUS, "postgresql": POSTGRESQL}
    return {
        FOLDER / f"{source}.json": json.dumps(build(source, panels), indent=2) + "\n"
        for source, panels in dashboards.items()
    }


if __name__ == "__main__":
    for file, text in render().items():
        file.write_text(text, encoding="utf-8")
        print(file)
