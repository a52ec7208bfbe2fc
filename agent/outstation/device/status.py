"""Status documents: the state of the device, of each task and of each site reference, as JSON members.

`outstation status`, `outstation reference show` and the remote command `report` return them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from outstation.device.batch_parts import deadline, drift_state, joined_streams
from outstation.device.bundles import history, overrides, rollout_state
from outstation.device.capacity import space
from outstation.device.config import Config, StreamConfig
from outstation.device.config.sources import SOURCES, ExecSource
from outstation.device.machine.throttle import Throttle
from outstation.device.machine.timekeeping import build_report, make_clock
from outstation.device.pipeline import relearn, tuning_cache
from outstation.device.recovery.report_findings import inspect_condition
from outstation.device.samples import budget
from outstation.device.store import cost, label_store, task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.predictions import list_stored_outputs, output_key
from outstation.device.store.store import Store
from outstation.device.uplink import meter
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import BadBundle, UsageError
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.kernel import library
from outstation.ml.model.bundle import bundle

_MAX_ALERTS = 5
_MIN_COST_S = 600

_SITE_SUMMARY = ("number", "windows", "deviations", "held", "modes", "smallest_changes")


def build_document(conf: Config, store: Store) -> dict[str, Any]:
    """Return what `outstation status --json` prints."""
    waiting, last = store.outbox_size()
    metered = conf.broker.metered
    now, counters = make_clock(store)(), store.counters()
    hours, spent = space.hours_until_eviction(store, store.limit_bytes()), cost.read_process_cost(store.counters())
    # The first minutes write more than others: tables, a first reference.
    written = round(spent.written_bytes / spent.seconds * 86_400) if spent.seconds >= _MIN_COST_S else None
    return {
        "device": conf.device.id,
        "fleet": conf.device.fleet,
        "log": store.log_id,
        "clock": {"time": clock.to_rfc3339(now.wall_us), "quality": now.quality, **build_report(store, now)},
        "streams": [
            {
                "stream": name,
                "rows": store.last_row(name),
                "kept_from": store.first_row(name),
                "duplicate_rows": counters.get(f"rows duplicate.{name}", 0),
                "late_rows": counters.get(f"rows late.{name}", 0),
                "step_rows": counters.get(f"rows step.{name}", 0),
                "out_of_order_rows": counters.get(f"rows out of order.{name}", 0),
                **_count_restarts(stream, counters, name),
                "last": _describe_last_row(store, name, stream, now),
            }
            for name, stream in conf.streams.items()
        ],
        "tasks": [build_task_document(conf, store, name) for name in conf.tasks],
        "outbox": {"waiting": waiting, "last": last},
        "metered": None if metered is None else meter.build_status(metered, store, now),
        "store": {
            "written_per_day": written,
            "bytes": store.used_bytes(),
            "max": int(conf.buffer.max_size),
            "hours": hours,
        },
        "kernel": library.describe(),
        "condition": inspect_condition(store).document,
        "throttle": Throttle(conf.throttle).tick(now).to_dict(),
        "rejected": counters.get("lines rejected", 0),
        "other_categories": counters.get("categories over limit", 0),
        "refused_connections": counters.get("connections refused", 0),
        "full_lines": counters.get("lines refused while full", 0),
        "cut_off_lines": counters.get("lines cut off", 0),
        "delayed_connections": counters.get("connections delayed", 0),
        "failed_files": counters.get("files failed", 0),
        "duplicate_files": counters.get("files duplicate", 0),
        **budget.to_status(store, conf.samples, now),
        "alerts": store.recent_alerts(_MAX_ALERTS),
    }


def limit_status(document: Mapping[str, Any], message_log: MessageLog) -> dict[str, Any]:
    """Return a status document without the alerts and label metrics that the owners of streams keep on the device."""
    tasks = []
    for task in document["tasks"]:
        limited = {**task, "open": [alert for alert in task["open"] if not alert.get("kept")]}
        if message_log.field_privacy(task["task"]).keeps("quality"):
            outputs = {name: {**output, "quality": None} for name, output in task["outputs"].items()}
            limited |= {"quality": None, "outputs": outputs}
        tasks.append(limited)
    alerts = [alert for alert in document["alerts"] if not alert.get("kept")]
    return {**document, "tasks": tasks, "alerts": alerts}


def _count_restarts(stream: StreamConfig, counters: Mapping[str, int], name: str) -> dict[str, int]:
    """Count how often a program, or a source of another package, was started again; {} for other sources.

    A program may also be silent, be held back, or lose lines.
    """
    if not SOURCES.is_shipped(stream.source.kind):
        return {"source_restarts": counters.get(f"source restarts.{name}", 0)}
    if not isinstance(stream.source, ExecSource):
        return {}
    kinds = {"restarts": "restarts", "silences": "silent", "floods": "held back", "losses": "lines lost"}
    return {f"program_{member}": counters.get(f"program {kind}.{name}", 0) for member, kind in kinds.items()}


def _describe_last_row(store: Store, name: str, stream: StreamConfig, now: ClockReading) -> dict[str, Any] | None:
    """Return time and age of a stream's newest row, without its values: this document may leave the device."""
    batch = store.read_rows(name, stream.fields, store.last_row(name) - 1, 1)
    if batch is None or batch.loss_reason:
        return None
    t = int(batch.rows.t[0])
    return {"time": clock.to_rfc3339(t), "age_s": round((now.wall_us - t) / 1e6, 3)}


def build_task_document(conf: Config, store: Store, name: str) -> dict[str, Any]:
    """Return one of the `tasks` of the status document."""
    task, counters = conf.tasks[name], store.counters()
    cursor = store.cursor(name) or 0
    bundles = history.load_history(store, name)
    tunings = tuning_cache.load(store, name)
    outputs = {output: _describe_output(store, name, output) for output in store.query(list_stored_outputs, name)}
    return {
        "task": name,
        "stream": task.stream,
        "schedule": overrides.load_schedule(store, name) or task.schedule,
        "row": cursor,
        "backlog": store.last_row(task.stream) - cursor,
        "windows": counters.get(f"windows.{name}", 0),
        "bundle": _describe_configured(conf, store, name) if bundles is None else str(bundles.current),
        "pace": msgspec.to_builtins(tunings[0]) if tunings else None,
        "site_reference": store.load_state(name, task_keys.SITE_REFERENCE) is not None,
        "reference": _summarize_reference(conf, store, name),
        "open": store.open_alerts(name),
        **outputs.pop(""),
        "outputs": outputs,
        **joined_streams.to_status(store, name, task.inputs),
        **deadline.to_status(store, counters, name, task.deadline),
        **overrides.to_status(store, name),
        **rollout_state.build_status(store, name, conf.device.id),
    }


def _describe_output(store: Store, task: str, output: str) -> dict[str, Any]:
    """Return the stored labels of an output, and its newest metrics by them."""
    key = output_key(task, output)
    label_metrics = store.load_state(key, task_keys.LAST_LABEL_METRICS)
    return {
        "labels": msgspec.to_builtins(store.query(label_store.count_labels, key)),
        "quality": json.loads(label_metrics) if label_metrics else None,
    }


def build_reference_document(conf: Config, store: Store, task: str) -> dict[str, Any]:
    """Return the site reference in force, the progress of learning, and the pending request.

    Raises UsageError for a damaged reference.
    """
    request = relearn.pending_request(store, task)
    document: dict[str, Any] = {
        "task": task,
        "site": None,
        "learning": None,
        "asked": request.action if request else None,
    }
    stored = store.load_state(task, task_keys.SITE_REFERENCE)
    state = drift_state.load_for_display(store, task)
    if stored is not None:
        document["site"] = _describe_site(stored)
        if document["site"] is not None and state is not None:
            guard = state.guard
            document["site"] |= {"deviations": [d.describe() for d in guard.deviations], "held": guard.is_held}
    if document["site"] is None and state is not None:
        document["learning"] = {
            "windows": state.learning.total_windows,
            "of": conf.tasks[task].learn_windows,
            "for_s": max(state.requested_learn_s, float(conf.tasks[task].learn_duration)),
            "seconds": round(state.learning.observed_s, 3),
            "times": conf.tasks[task].learn_extension,
        }
    return document


def _describe_configured(conf: Config, store: Store, name: str) -> str:
    """Return name and version of the bundle of a task that never ran."""
    manifest = bundle.read(history.locate_bundle(conf, store, name), None).manifest
    return f"{manifest.name} {manifest.version}"


def _summarize_reference(conf: Config, store: Store, task: str) -> dict[str, Any]:
    """Return `site`, `learning` and `warning`; a reference that cannot be read becomes a warning."""
    try:
        document = build_reference_document(conf, store, task)
    except UsageError as problem:
        return {"site": None, "learning": None, "warning": str(problem)}
    site = document["site"]
    return {
        "site": {name: site[name] for name in _SITE_SUMMARY} if site else None,
        "learning": document["learning"],
        "warning": site["warning"] if site else None,
    }


def _describe_site(stored: bytes) -> dict[str, Any] | None:
    """Return the members of a stored site reference; None for a format of an earlier version, which is not in force."""
    try:
        reference = Reference.from_json(stored)
    except BadBundle as problem:
        raise UsageError(
            f"the site reference in the store is damaged ({problem}); drop it with `outstation reference reset`"
        ) from None
    site = reference.site
    if site is None:
        return None
    begin, end = (clock.to_rfc3339(t) for t in site.learned)
    return {
        "number": site.number,
        "digest": reference.digest,
        "windows": reference.drift_windows,
        "from": begin,
        "to": end,
        "hours": [int(hour) for hour in site.hours.nonzero()[0]],
        "daily": bool(site.waves.any()),
        "modes": site.mode_count,
        "smallest_changes": reference.describe_smallest_changes(),
        "warning": reference.warning,
        "deviations": [],
        "held": False,
    }
