"""Metric families of devices and of the fleet, from the state that the dashboard shows.

Labels are bounded: names of enrolled devices, names of tasks, outputs and streams (a few per device), and fixed
words. Numbers come from signed messages, and are left out where a device sent anything else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from outstation.fleet.dashboard.state.fleet_state import DeviceState, TaskState, as_object
from outstation.foundation import clock
from outstation.foundation.names import is_name
from outstation.foundation.text import printable
from outstation.ml.performance.estimates import CHANCE_ECE
from outstation.ml.performance.metrics import METRICS

STATES = ("online", "offline", "stopped", "silent", "enrolled", "revoked")
DRIFT_STATES = ("ok", "drift", "fault", "insufficient")
SEVERITIES = ("critical", "warning", "info")
# Of one device: more than any config has, and few enough for a hostile one.
MAX_TASKS, MAX_STREAMS, MAX_OUTPUTS = 32, 64, 64
MAX_REASONS = 50
_MAX_LABEL = 64
_FLEET, _DEVICE = ("fleet",), ("fleet", "device")
_TASK, _STREAM = (*_DEVICE, "task"), (*_DEVICE, "stream")
_OUTPUT, _METRIC = (*_TASK, "output"), (*_TASK, "output", "metric")
METRIC_NAMES = frozenset({CHANCE_ECE, *(metric.name for metric in METRICS)})


class FleetTotals(msgspec.Struct, frozen=True):
    """Sums of the database: messages that are missing or evicted, and refused ones by reason."""

    missing: Mapping[str, int]
    refusals: Mapping[str, int]


def build_families(
    fleet: str,
    devices: Iterable[DeviceState],
    fleet_alerts: Iterable[Mapping[str, Any]],
    totals: FleetTotals | None,
    read_us: int,
    now_us: int,
) -> Iterator[Metric]:
    """Yield all families; `fleet_alerts` are open alerts of the collector, `totals` None if they cannot be read."""
    known = [*devices]
    yield from _build_device_families(fleet, known, now_us)
    yield from _build_task_families(fleet, known)
    yield from _build_quality_families(fleet, known)

    def gauge(name: str, help_text: str, samples: Mapping[str, float], label: str = "") -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, help_text, labels=(*_FLEET, label) if label else _FLEET)
        for value, number in samples.items():
            family.add_metric((fleet, value) if label else (fleet,), number)
        return family

    counts = Counter(device.status(now_us) for device in known)
    severities = Counter(alert["severity"] for alert in fleet_alerts if not alert["device"])
    yield gauge("outstation_database_up", "1 if the fleet database could be read.", {"": float(totals is not None)})
    yield gauge("outstation_database_read_timestamp_seconds", "Time of these numbers.", {"": read_us / 1e6})
    by_state = {state: counts[state] for state in STATES}
    yield gauge("outstation_fleet_devices", "Enrolled devices by state.", by_state, "state")
    by_severity = {severity: severities[severity] for severity in SEVERITIES}
    yield gauge("outstation_fleet_alerts_open", "Open alerts about the fleet as a whole.", by_severity, "severity")
    if totals is None:
        return
    missing, evicted = {"": totals.missing["missing"]}, {"": totals.missing["evicted"]}
    yield gauge("outstation_fleet_missing_messages", "Messages that did not arrive, and no device explains.", missing)
    yield gauge("outstation_fleet_evicted_messages", "Messages that devices declared as evicted.", evicted)
    refused = CounterMetricFamily(
        "outstation_fleet_refused_messages", "Messages that collectors refused.", labels=("fleet", "reason")
    )
    for reason, count in bound_reasons(totals.refusals).items():
        refused.add_metric((fleet, reason), count)
    yield refused


def _build_device_families(fleet: str, devices: Iterable[DeviceState], now_us: int) -> Iterator[Metric]:
    def gauge(name: str, help_text: str, labels: tuple[str, ...] = _DEVICE) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"outstation_device_{name}", help_text, labels=labels)

    up = gauge("up", "1 if the device is online and was heard of lately.")
    states = gauge("state", "1 for the state of the device.", (*_DEVICE, "state"))
    seen = gauge("last_seen_timestamp_seconds", "Time of the last verified message.")
    outbox = gauge("outbox_messages", "Messages that waited at the device.")
    used = gauge("storage_used_bytes", "Size of the device's store.")
    limit = gauge("storage_limit_bytes", "Limit of the device's store.")
    left = gauge("storage_left_seconds", "Time until the device evicts data, at its present rate.")
    temperature = gauge("temperature_celsius", "Temperature of the device's hottest sensor.")
    alerts = gauge("alerts_open", "Open alerts of the device and about it.", (*_DEVICE, "severity"))
    rejected = CounterMetricFamily("outstation_device_rejected_rows", "Rows that intake rejected.", labels=_DEVICE)
    rows = CounterMetricFamily("outstation_stream_accepted_rows", "Rows that intake accepted.", labels=_STREAM)
    info = InfoMetricFamily("outstation_device", "Version of the device's software.", labels=_DEVICE)
    for device in devices:
        labels = (fleet, device.device)
        status = device.status(now_us)
        up.add_metric(labels, float(status == "online"))
        for state in STATES:
            states.add_metric((*labels, state), float(state == status))
        if device.last_seen is not None and (seen_us := _parse_time(device.last_seen)):
            seen.add_metric(labels, seen_us / 1e6)
        severities = [alert["severity"] for alert in device.alerts]
        for severity in SEVERITIES:
            alerts.add_metric((*labels, severity), severities.count(severity))
        health = device.health
        if not health:
            continue
        store, throttle = as_object(health.get("store")), as_object(health.get("throttle"))
        _add(outbox, labels, health.get("outbox"))
        _add(used, labels, store.get("bytes"))
        _add(limit, labels, store.get("max"))
        _add(left, labels, store.get("hours"), 3600.0)
        _add(temperature, labels, throttle.get("temperature"))
        _add(rejected, labels, health.get("rejected"))
        for stream, reported in _named(health.get("streams"), MAX_STREAMS):
            _add(rows, (*labels, stream), reported.get("rows"))
        info.add_metric(labels, {"version": to_label(health.get("agent"))})
    yield from (up, states, seen, outbox, used, limit, left, temperature, alerts, rejected, rows, info)


def _build_task_families(fleet: str, devices: Iterable[DeviceState]) -> Iterator[Metric]:
    backlog = GaugeMetricFamily("outstation_task_backlog_rows", "Rows that the task has not consumed.", labels=_TASK)
    consumed = CounterMetricFamily("outstation_task_consumed_rows", "Rows that the task consumed.", labels=_TASK)
    windows = CounterMetricFamily("outstation_task_drift_windows", "Drift windows that the task tested.", labels=_TASK)
    drift = GaugeMetricFamily(
        "outstation_task_drift_state", "1 for the state of the newest drift window.", labels=(*_TASK, "state")
    )
    tested = GaugeMetricFamily(
        "outstation_task_drift_window_end_timestamp_seconds", "End of the newest drift window.", labels=_TASK
    )
    bundle = InfoMetricFamily("outstation_task_bundle", "Bundle that the task runs.", labels=_TASK)
    for device in devices:
        streams = dict(_named(device.health.get("streams"), MAX_STREAMS))
        tasks: list[TaskState] = [task for task in device.tasks if is_name(task.name)][:MAX_TASKS]
        for task in tasks:
            labels = (fleet, device.device, task.name)
            rows = streams.get(task.stream, {}).get("rows")
            if type(rows) is int:
                _add(backlog, labels, max(0, rows - task.row))
            _add(consumed, labels, task.row)
            _add(windows, labels, task.windows)
            if task.drift in DRIFT_STATES:
                for state in DRIFT_STATES:
                    drift.add_metric((*labels, state), float(state == task.drift))
                if end_us := _parse_time(task.drift_time):
                    tested.add_metric(labels, end_us / 1e6)
            if task.model:
                bundle.add_metric(labels, {"name": to_label(task.model), "version": to_label(task.version)})
    yield from (backlog, consumed, windows, drift, tested, bundle)


def _build_quality_families(fleet: str, devices: Iterable[DeviceState]) -> Iterator[Metric]:
    """Yield metrics by labels of each output of the bundles that run; only names of known metrics become series."""

    def gauge(name: str, help_text: str, labels: tuple[str, ...] = _METRIC) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"outstation_task_quality{name}", help_text, labels=labels)

    bounds = {
        "value": gauge("", "Metric of the newest labelled results."),
        "low": gauge("_low", "Lower end of its 95 % interval."),
        "high": gauge("_high", "Upper end of its 95 % interval."),
    }
    labels = gauge("_labels", "Labelled results that the metrics rest on.", _OUTPUT)
    measured = gauge("_timestamp_seconds", "Time of the metrics.", _OUTPUT)
    for device in devices:
        running = {task.name: task.digest for task in device.tasks}
        current = [q for q in device.quality if q.digest and q.digest == running.get(q.task)]
        for quality in current[:MAX_OUTPUTS]:
            place = (fleet, device.device, quality.task, quality.output)
            _add(labels, place, quality.labels)
            if time_us := _parse_time(quality.time):
                measured.add_metric(place, time_us / 1e6)
            known = {metric["metric"]: metric for metric in quality.metrics if metric.get("metric") in METRIC_NAMES}
            for name, metric in known.items():
                for member, family in bounds.items():
                    _add(family, (*place, name), metric.get(member))
    yield from (*bounds.values(), labels, measured)


def bound_reasons(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the most frequent reasons, and the others added up as `other`."""
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    bounded = {to_label(reason): count for reason, count in ordered[:MAX_REASONS]}
    if others := sum(count for _, count in ordered[MAX_REASONS:]):
        bounded["other"] = bounded.get("other", 0) + others
    return bounded


def to_label(value: object) -> str:
    """Return a text as the value of a label: short, on one line, and encodable."""
    return printable(value[:_MAX_LABEL])[:_MAX_LABEL] if isinstance(value, str) else ""


def _add(
    family: GaugeMetricFamily | CounterMetricFamily, labels: tuple[str, ...], value: object, factor: float = 1.0
) -> None:
    """Add a finite number that is not negative unless it may be (a temperature); leave out anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    try:
        number = float(value) * factor
    except OverflowError:
        return
    if math.isfinite(number) and (number >= 0 or isinstance(family, GaugeMetricFamily)):
        family.add_metric(labels, number)


def _named(members: object, most: int) -> list[tuple[str, dict[str, Any]]]:
    """Return the first members whose names are valid, each an object."""
    named = [(name, as_object(value)) for name, value in as_object(members).items() if is_name(name)]
    return named[:most]


def _parse_time(text: str) -> int:
    try:
        return clock.parse_rfc3339(text)
    except ValueError:
        return 0
