"""Page *device*: health, streams, results over time, drift of each field, bundles, roll-outs, keys and clock."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from outstation.fleet.dashboard.pages import views
from outstation.fleet.dashboard.pages.visit import Visit
from outstation.fleet.dashboard.state.fleet_state import DeviceState, TaskState, as_object, decode_object
from outstation.fleet.database.dashboard import history, messages
from outstation.fleet.database.dashboard import results as result_statements
from outstation.fleet.database.dashboard.results import StoredResult
from outstation.fleet.database.interface import Connection
from outstation.fleet.database.labelling import verdicts as verdict_statements
from outstation.fleet.database.labelling.verdicts import Verdict
from outstation.fleet.database.store import FleetStore
from outstation.fleet.labelling import verdicts
from outstation.fleet.labelling.verdicts import Judge
from outstation.foundation import clock
from outstation.foundation.text import printable

RANGES = {"1h": 3600, "24h": 86_400, "7d": 7 * 86_400, "30d": 30 * 86_400, "all": 0}
_POINTS = 800
_MAX_LABELS = 64
_LISTED = 12
_MAX_OUTPUTS = 60  # a device may claim any
# Times that a chart can show; a producer may claim any.
_MAX_US = 32_503_680_000_000_000


class DeviceQuery(msgspec.Struct, frozen=True):
    device: str
    task: str
    range: str

    @classmethod
    def parse(cls, device: DeviceState, query: QueryParams) -> DeviceQuery:
        tasks = [task.name for task in device.tasks]
        task = views.choose(query.get("task"), tasks, tasks[0] if tasks else "")
        return cls(device.device, task, views.choose(query.get("range"), [*RANGES], "24h"))

    def path(self, page: str = "", **changes: object) -> str:
        parameters = {"task": self.task, "range": self.range, **changes}
        return views.query_path(f"/devices/{views.quote_path(self.device)}{page}", parameters, {"range": "24h"})

    def since_us(self) -> int:
        seconds = RANGES[self.range]
        return clock.read().wall_us - seconds * 1_000_000 if seconds else -(2**63)


def _find(visit: Visit) -> DeviceState:
    name = visit.request.path_params["device"]
    device = visit.dashboard.state.devices.get(name)
    if device is None:
        raise HTTPException(404, f"no device {name!r} is enrolled")
    return device


async def show(visit: Visit) -> Response:
    device = _find(visit)
    query = DeviceQuery.parse(device, visit.request.query_params)
    task = next((task for task in device.tasks if task.name == query.task), None)
    loaded, health = await visit.dashboard.reader.read(lambda db: _load(db, device, task)), device.health
    return visit.render(
        "device.html",
        title=device.device,
        watch=device.device,
        device=device,
        health=health,
        task=task,
        query=query,
        ranges=RANGES,
        now_us=clock.read().wall_us,
        can_judge=visit.visitor.may("operator"),
        known_labels=sorted({result.label for result in loaded["results"] if result.label is not None}),
        streams=_streams(health),
        store=as_object(health.get("store")),
        samples=as_object(health.get("samples")),
        wall_clock=as_object(health.get("wall_clock")),
        **loaded,
    )


def _load(db: Connection, device: DeviceState, task: TaskState | None) -> dict[str, Any]:
    name, log = device.device, device.log
    return {
        "keys": messages.load_keys(db, name),
        "logs": messages.load_logs(db, name, _LISTED),
        "gaps": messages.load_gaps(db, name, _LISTED),
        "newest": messages.load_newest_messages(db, name, log, _LISTED),
        "phases": history.load_phases(db, name, log, _LISTED),
        "quality": _load_quality(db, name, log, task.name) if task else [],
        "collector_metrics": history.load_collector_metrics(db, name, task.name) if task else [],
        "windows": history.load_windows(db, name, task.name, _LISTED) if task else [],
        **_load_results(db, name, task),
    }


def _load_quality(db: Connection, device: str, log: str, task: str) -> list[dict[str, Any]]:
    """Return the newest message with metrics of each output, the first output first."""
    newest = history.load_quality(db, device, log, task, _MAX_OUTPUTS)
    return [{**row, "metrics": _metrics(decode_object(row["body"]))} for row in newest]


def _load_results(db: Connection, device: str, task: TaskState | None) -> dict[str, Any]:
    """Return the newest results, which are of one log, and the verdicts on them by row."""
    newest = result_statements.load_newest(db, device, task.name, _LISTED) if task else []
    verdicts_by_row: dict[int, list[Verdict]] = {}
    if task and newest:
        key = (device, task.name, newest[0].log)
        verdicts_by_row = verdict_statements.load_for_rows(db, key, [result.row for result in newest])
    texts = result_statements.load_outputs(db, device, newest)
    outputs = {row: decode_object(text) for row, text in texts.items()}
    return {"results": newest, "verdicts": verdicts_by_row, "outputs": outputs}


async def results(visit: Visit) -> Response:
    """Return the results over time as columns; at most `_POINTS` of them, evenly spaced."""
    device = _find(visit)
    query = DeviceQuery.parse(device, visit.request.query_params)
    since_us = query.since_us()

    def load(db: Connection) -> tuple[list[StoredResult], bool]:
        return result_statements.load_series(db, device.device, query.task, since_us, _MAX_US, _POINTS)

    series, sampled = await visit.dashboard.reader.read(load)
    series = sorted((result for result in series if -_MAX_US < result.t < _MAX_US), key=lambda result: result.t)
    names = sorted({result.label for result in series if result.label is not None})[:_MAX_LABELS]
    index = {label: i for i, label in enumerate(names)}
    document = {
        "t": [result.t / 1e6 for result in series],
        "label": [index.get(result.label or "") for result in series] if names else None,
        "score": _to_finite([result.score for result in series]),
        "value": _to_finite([result.value for result in series]),
        "labels": [printable(name) for name in names],
        "paths": [views.message_path(device.device, result.log, result.seq) for result in series],
        "sampled": sampled,
    }
    return Response(msgspec.json.encode(document), 200, None, "application/json")


def _to_finite(values: list[float | None]) -> list[float | None] | None:
    numbers = [value if value is not None and math.isfinite(value) else None for value in values]
    return numbers if any(number is not None for number in numbers) else None


async def drift(visit: Visit) -> Response:
    """Return the drift plot of one task, as `outstation fleet drift --plot` draws it."""
    device = _find(visit)
    query = DeviceQuery.parse(device, visit.request.query_params)
    dark = visit.request.query_params.get("dark") == "1"
    since = clock.to_rfc3339(query.since_us()) if RANGES[query.range] else None

    def plot(store: FleetStore) -> str:
        return visit.dashboard.plot_drift(store, device.device, query.task, since, dark)

    svg = await visit.dashboard.reader.read_store(plot)
    headers = {"content-security-policy": "default-src 'none'", "cache-control": "private, max-age=5"}
    return Response(svg, 200, headers, "image/svg+xml")


async def judge(visit: Visit) -> Response:
    """Store or withdraw the visitor's verdict on a result: it is right, or its true label is another."""
    visit.require("operator")
    device, form = _find(visit), await visit.form()
    task, row, action = form.get("task", "")[:64], form.get("row", ""), form.get("action", "")
    if not row.isdecimal() or len(row) > 15 or action not in ("confirm", "correct", "withdraw"):
        raise HTTPException(400, "a verdict needs the row of a result and an action: confirm, correct or withdraw")
    log = form.get("log", "")[:64] or None
    text = form.get("label", "").strip() if action == "correct" else None
    author = Judge(visit.visitor.name, "dashboard", clock.now_rfc3339(), form.get("note", "").strip()[:500])

    def write(store: FleetStore) -> str:
        with store.transaction() as db:
            if action == "withdraw":
                verdicts.withdraw(db, device.device, task, int(row), author, log)
                return f"row {row}: verdict withdrawn"
            given = verdicts.judge_result(db, device.device, task, int(row), text, author, log=log)
            return f"row {row} is {given.label}: {given.verdict}"

    await visit.act("verdict", f"{device.device}/{task}", write)
    back = form.get("back", "")
    here = f"/devices/{views.quote_path(device.device)}?task={views.quote_path(task)}#results"
    return RedirectResponse(back if back.startswith("/labels") else here, 303)


def _streams(health: dict[str, Any]) -> list[dict[str, Any]]:
    streams = health.get("streams")
    return [
        {"name": name, **{key: stream.get(key) for key in ("rows", "first")}}
        for name, stream in (streams if isinstance(streams, dict) else {}).items()
        if isinstance(stream, dict)
    ]


def _metrics(body: dict[str, Any]) -> list[dict[str, Any]]:
    metrics = body.get("metrics")
    return [
        metric
        for metric in (metrics if isinstance(metrics, list) else [])
        if isinstance(metric, dict) and not metric.get("slice")
    ]
