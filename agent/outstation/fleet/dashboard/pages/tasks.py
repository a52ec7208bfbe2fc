"""Page *tasks*: one task across all devices, with drift, versions and the newest results."""

from __future__ import annotations

from collections import Counter
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from outstation.fleet.dashboard.pages import views
from outstation.fleet.dashboard.pages.visit import Visit
from outstation.fleet.dashboard.state.fleet_state import DeviceState, TaskState
from outstation.fleet.database.dashboard import results
from outstation.fleet.database.interface import Connection

_PAGE_ROWS, _MAX_ROWS = 100, 2000
_ORDER = {state: i for i, state in enumerate(("fault", "drift", "insufficient", "ok", ""))}


def _running(visit: Visit, name: str | None = None) -> list[tuple[DeviceState, TaskState]]:
    devices = visit.dashboard.state.devices.values()
    return [(d, task) for d in devices for task in d.tasks if name is None or task.name == name]


async def show(visit: Visit) -> Response:
    summaries: dict[str, dict[str, Any]] = {}
    for device, task in _running(visit):
        summary = summaries.setdefault(
            task.name, {"devices": 0, "drift": Counter(), "versions": Counter(), "alerts": 0, "windows": 0}
        )
        summary["devices"] += 1
        summary["windows"] += task.windows
        summary["drift"][task.drift] += 1
        summary["versions"][f"{task.model} {task.version}"] += 1
        summary["alerts"] += sum(alert["task"] == task.name for alert in device.alerts)
    return visit.render("tasks.html", title="Tasks", watch="*", tasks=dict(sorted(summaries.items())))


async def show_one(visit: Visit) -> Response:
    name, query = visit.request.path_params["task"], visit.request.query_params
    running = _running(visit, name)
    if not running:
        raise HTTPException(404, f"no device reports a task {name[:64]!r}")
    drift, limit = query.get("drift", ""), views.parse_limit(query, _PAGE_ROWS, _MAX_ROWS)
    rows = [pair for pair in running if drift not in _ORDER or not drift or pair[1].drift == drift]
    rows.sort(key=lambda pair: (_ORDER.get(pair[1].drift, 9), pair[0].device))
    shown = rows[:limit]

    def load(db: Connection) -> list[Any]:
        return results.load_last_of_each(db, [(device.device, name) for device, _ in shown])

    newest = await visit.dashboard.reader.read(load)
    alerts = [
        alert for alert in visit.dashboard.state.collector_alerts if not alert["device"] and alert["task"] == name
    ]
    return visit.render(
        "task.html",
        title=name,
        watch="*",
        task=name,
        rows=[(*pair, result) for pair, result in zip(shown, newest, strict=True)],
        total=len(running),
        matching=len(rows),
        drift=drift if drift in _ORDER else "",
        states=Counter(task.drift for _, task in running),
        versions=Counter((task.model, task.version) for _, task in running).most_common(8),
        fleet_alerts=alerts,
        more=min(limit * 3, _MAX_ROWS) if len(rows) > limit and limit < _MAX_ROWS else 0,
    )
