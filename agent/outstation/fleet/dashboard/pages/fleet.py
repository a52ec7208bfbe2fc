"""Page *fleet*: all devices, searched, filtered, sorted and grouped by the address."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

import msgspec
from starlette.datastructures import QueryParams
from starlette.responses import Response

from outstation.fleet.dashboard.pages import views
from outstation.fleet.dashboard.pages.visit import Visit
from outstation.fleet.dashboard.state.fleet_state import DeviceState
from outstation.foundation import clock

PAGE_ROWS, MAX_ROWS = 100, 2000
STATES = ("online", "silent", "offline", "stopped", "enrolled", "revoked")
DRIFTS = ("drift", "fault", "insufficient", "ok")
SORTS = ("device", "state", "seen", "backlog", "drift", "alerts")
GROUPS = ("state", "task", "model", "prefix")
_DEFAULTS: Mapping[str, object] = {"q": "", "state": "", "drift": "", "alerts": "", "sort": "alerts", "down": "",
                                   "group": "", "n": PAGE_ROWS}  # fmt: skip
_STATE_ORDER = {state: i for i, state in enumerate(("silent", "offline", "online", "stopped", "enrolled", "revoked"))}
_DRIFT_ORDER = {state: i for i, state in enumerate(("fault", "drift", "insufficient", "ok", ""))}
_SEVERITY_ORDER = {state: i for i, state in enumerate(("critical", "warning", "info", ""))}


class FleetQuery(msgspec.Struct, frozen=True):
    q: str
    state: str
    drift: str
    alerts: str
    sort: str
    down: str
    group: str
    n: int

    @classmethod
    def parse(cls, query: QueryParams) -> FleetQuery:
        return cls(
            query.get("q", "")[:100].strip(),
            views.choose(query.get("state"), STATES, ""),
            views.choose(query.get("drift"), DRIFTS, ""),
            "1" if query.get("alerts") else "",
            views.choose(query.get("sort"), SORTS, "alerts"),
            "1" if query.get("down") else "",
            views.choose(query.get("group"), GROUPS, ""),
            views.parse_limit(query, PAGE_ROWS, MAX_ROWS),
        )

    def path(self, **changes: object) -> str:
        return views.query_path("/fleet", {**msgspec.structs.asdict(self), **changes}, _DEFAULTS)

    def matches(self, device: DeviceState, now_us: int) -> bool:
        return (
            (not self.state or device.status(now_us) == self.state)
            and (not self.drift or device.drift == self.drift)
            and (not self.alerts or bool(device.alerts))
            and (not self.q or self.q.lower() in _searched_text(device))
        )


def _searched_text(device: DeviceState) -> str:
    words = [device.device, *(f"{task.name} {task.model} {task.version}" for task in device.tasks)]
    return " ".join(words).lower()


async def show(visit: Visit) -> Response:
    query, now_us = FleetQuery.parse(visit.request.query_params), clock.read().wall_us
    devices = visit.dashboard.state.devices
    rows = [device for device in devices.values() if query.matches(device, now_us)]
    rows.sort(key=lambda device: device.device)
    rows.sort(key=_sort_key(query.sort, now_us), reverse=bool(query.down))
    shown = rows[: query.n]
    return visit.render(
        "fleet.html",
        title="Fleet",
        watch="*",
        query=query,
        now_us=now_us,
        total=len(devices),
        matching=len(rows),
        groups=_group(shown, query.group, now_us),
        counts=_count(devices.values(), now_us),
        fleet_alerts=[alert for alert in visit.dashboard.state.collector_alerts if not alert["device"]],
        states=STATES,
        drifts=DRIFTS,
        sorts=SORTS,
        more=min(query.n * 3, MAX_ROWS) if len(rows) > query.n and query.n < MAX_ROWS else 0,
    )


def _sort_key(sort: str, now_us: int) -> Callable[[DeviceState], Any]:
    keys: dict[str, Callable[[DeviceState], Any]] = {
        "device": lambda device: device.device,
        "state": lambda device: _STATE_ORDER.get(device.status(now_us), 9),
        # Newest first.
        "seen": lambda device: [-ord(char) for char in device.last_seen or ""] or [0],
        "backlog": lambda device: -(device.backlog or 0),
        "drift": lambda device: _DRIFT_ORDER.get(device.drift, 9),
        "alerts": lambda device: (_SEVERITY_ORDER[device.severity], -len(device.alerts)),
    }
    return keys[sort]


def _count(devices: Any, now_us: int) -> dict[str, int]:
    """Return how many devices have each state, each drift and an open alert."""
    counts = dict.fromkeys((*STATES, *DRIFTS, "alerts"), 0)
    for device in devices:
        counts[device.status(now_us)] = counts.get(device.status(now_us), 0) + 1
        counts["alerts"] += bool(device.alerts)
        if device.drift:
            counts[device.drift] += 1
    return counts


def _group(rows: list[DeviceState], group: str, now_us: int) -> list[tuple[str, list[DeviceState]]]:
    """Return (name of the group, its devices); a device without a task is in the group ''."""
    names: dict[str, Callable[[DeviceState], str]] = {
        "state": lambda device: device.status(now_us),
        "task": lambda device: ", ".join(task.name for task in device.tasks),
        "model": lambda device: ", ".join(f"{task.model} {task.version}" for task in device.tasks),
        "prefix": lambda device: device.device.rpartition("-")[0] or device.device,
    }
    if group not in names:
        return [("", rows)]
    name = names[group]
    return [(key, [*members]) for key, members in groupby(sorted(rows, key=name), key=name)]
