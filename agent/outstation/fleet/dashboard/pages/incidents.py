"""Page *incidents*: an inbox of alerts with what to do, and of each the readings around it and what people decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import msgspec
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from outstation.fleet.dashboard.pages import views
from outstation.fleet.dashboard.pages.visit import Visit
from outstation.fleet.dashboard.state.fleet_state import as_object, decode_object
from outstation.fleet.database.dashboard import history, messages
from outstation.fleet.database.interface import Connection
from outstation.fleet.database.labelling import verdicts as verdict_statements
from outstation.fleet.database.store import FleetStore
from outstation.fleet.incidents import incidents
from outstation.fleet.incidents.incidents import IncidentFilter
from outstation.fleet.labelling import verdicts
from outstation.fleet.labelling.verdicts import Judge
from outstation.foundation import clock
from outstation.foundation.errors import UsageError
from outstation.protocol.alerts.incident import Incident, Status

STATUSES = ("open", "raised", "acknowledged", "muted", "cleared", "all")
SEVERITIES = ("info", "warning", "critical")
PAGE_ROWS, MAX_ROWS = 50, 1000
MUTES = {"1 h": 1, "8 h": 8, "1 d": 24, "7 d": 168}
_DEFAULTS: Mapping[str, object] = {"status": "open", "severity": "info", "device": "", "task": "", "n": PAGE_ROWS}
_ACTIONS: Mapping[str, Callable[..., None]] = {
    "acknowledge": incidents.acknowledge,
    "withdraw": incidents.withdraw_acknowledgement,
    "mute": incidents.mute,
    "unmute": incidents.unmute,
}
_WINDOWS = 4
_MAX_EVIDENCE = 30


class InboxQuery(msgspec.Struct, frozen=True):
    status: str
    severity: str
    device: str
    task: str
    n: int

    @classmethod
    def parse(cls, query: QueryParams) -> InboxQuery:
        return cls(
            views.choose(query.get("status"), STATUSES, "open"),
            views.choose(query.get("severity"), SEVERITIES, "info"),
            query.get("device", "")[:64],
            query.get("task", "")[:64],
            views.parse_limit(query, PAGE_ROWS, MAX_ROWS),
        )

    def path(self, **changes: object) -> str:
        return views.query_path("/incidents", {**msgspec.structs.asdict(self), **changes}, _DEFAULTS)

    def to_filter(self) -> IncidentFilter:
        is_open = {"open": True, "cleared": False}.get(self.status)
        status: Any = self.status if self.status in ("raised", "acknowledged", "muted") else None
        severity: Any = self.severity
        return IncidentFilter(is_open, status, self.device or None, self.task or None, None, severity)


async def show(visit: Visit) -> Response:
    query, now = InboxQuery.parse(visit.request.query_params), clock.now_rfc3339()
    wanted = query.to_filter()

    def load(store: FleetStore) -> tuple[list[Incident], Mapping[Status, int]]:
        with store.snapshot():
            listed = incidents.list_incidents(store, wanted, now=now, newest_first=True, limit=query.n + 1)
            return listed, incidents.count_statuses(store, device=wanted.device, task=wanted.task, now=now)

    listed, by_status = await visit.dashboard.reader.read_store(load)
    total = sum(by_status.values())
    counts: dict[str, int] = {"all": total, "open": total - by_status["cleared"]}
    counts.update({str(status): n for status, n in by_status.items()})
    return visit.render(
        "incidents.html",
        title="Incidents",
        watch="*",
        query=query,
        incidents=listed[: query.n],
        counts=counts,
        statuses=STATUSES,
        severities=SEVERITIES,
        more=min(query.n * 2, MAX_ROWS) if len(listed) > query.n and query.n < MAX_ROWS else 0,
        can_handle=visit.visitor.may("operator"),
        mutes=MUTES,
    )


async def show_one(visit: Visit) -> Response:
    ref, now = visit.request.path_params["ref"], clock.now_rfc3339()

    def load(store: FleetStore) -> dict[str, Any]:
        with store.snapshot() as db:
            incident = _find(store, ref, now)
            return {"incident": incident, **_load_surroundings(db, incident)}

    loaded = await visit.dashboard.reader.read_store(load)
    incident: Incident = loaded["incident"]
    return visit.render(
        "incident.html",
        title=incident.subject,
        watch=f"{incident.device} incidents",
        can_handle=visit.visitor.may("operator"),
        mutes=MUTES,
        **loaded,
    )


async def decide(visit: Visit) -> Response:
    """Acknowledge, mute, or take one of both back."""
    visit.require("operator")
    ref, form, now = visit.request.path_params["ref"], await visit.form(), clock.now_rfc3339()
    action, note, by = form.get("action", ""), form.get("note", "").strip()[:500], visit.visitor.name
    if action not in _ACTIONS:
        raise HTTPException(400, "there is no such action")

    def run(store: FleetStore) -> Incident:
        incident = _find(store, ref, now)
        end = {"until": _mute_end(form.get("until", ""), now)} if action == "mute" else {}
        _ACTIONS[action](store, incident, by=by, note=note, now=now, **end)
        return incident

    try:
        incident = await visit.dashboard.reader.run_writer(run)
    except UsageError as error:
        await visit.record(f"{action} incident", ref, f"refused: {error}")
        raise
    await visit.record(f"{action} incident", f"{incident.device} {incident.id}", "done")
    back = form.get("back", "")
    return RedirectResponse(back if back.startswith("/incidents") else f"/incidents/{incident.ref}", 303)


async def judge(visit: Visit) -> Response:
    """Store whether an alert was right, and what was true of the result that it is about."""
    visit.require("operator")
    ref, form, now = visit.request.path_params["ref"], await visit.form(), clock.now_rfc3339()
    action, text = form.get("action", ""), form.get("label", "").strip()
    if action not in ("right", "false_alarm"):
        raise HTTPException(400, "a verdict on an alert is right or false_alarm")
    author = Judge(visit.visitor.name, "dashboard", now, form.get("note", "").strip()[:500])

    def write(store: FleetStore) -> str:
        incident = _find(store, ref, now)
        with store.transaction() as db:
            return verdicts.judge_alert(db, incident, is_right=action == "right", text=text or None, judge=author)

    await visit.act("verdict on alert", ref, write)
    return RedirectResponse(f"/incidents/{ref}#verdict", 303)


def _mute_end(text: str, now: str) -> str | None:
    if text not in MUTES:
        return None
    return clock.to_rfc3339(clock.parse_rfc3339(now) + MUTES[text] * 3_600_000_000)


def _find(store: FleetStore, ref: str, now: str) -> Incident:
    try:
        return incidents.find_incident(store, ref, now=now)
    except UsageError:
        raise HTTPException(404, f"there is no incident {ref[:20]!r}") from None


def _load_surroundings(db: Connection, incident: Incident) -> dict[str, Any]:
    """Return the evidence in the signed message, and what drift windows around it say about its field."""
    payload = messages.load_payload(db, incident.device, incident.log, incident.seq)
    evidence = as_object(decode_object(payload).get("evidence")) if payload and incident.source == "device" else {}
    windows = []
    if incident.task and incident.device:
        # Windows end at the times of rows, which a replay or a late upload has long before the message.
        begin_us = evidence.get("since")
        began = clock.to_rfc3339(begin_us) if _is_time(begin_us) else incident.raised
        near = history.load_windows_around(db, incident.device, incident.task, began, _WINDOWS)
        windows = [_summarize(window, incident.subject) for window in near]
    shown = {key: _as_shown(value) for key, value in [*evidence.items()][:_MAX_EVIDENCE]}
    row = verdicts.alert_row(db, incident)
    result = None
    if row is not None and incident.task is not None:
        result = verdict_statements.find_result(db, incident.device, incident.task, row, incident.log)
    return {
        "evidence": shown,
        "windows": windows,
        "verdicts": verdict_statements.load_of_alert(db, incident.key),
        "row": row,
        "answer": None if result is None else result[2],
    }


def _summarize(window: dict[str, Any], field: str) -> dict[str, Any]:
    """Return count, mean and spread of a field in one drift window; only the state where it has no such field."""
    summary = as_object(decode_object(window["features"]).get(field))
    counts = summary.get("counts")
    n = sum(counts) if isinstance(counts, list) and all(type(count) is int for count in counts) else None
    m2, mean = summary.get("m2"), summary.get("mean")
    sd = (m2 / n) ** 0.5 if n and isinstance(m2, int | float) and m2 >= 0 else None
    return {
        **{key: window[key] for key in ("to", "state", "log", "seq")},
        "n": window["n"],
        "mean": mean if isinstance(mean, int | float) else None,
        "sd": sd,
        "missing": summary.get("missing"),
    }


def _is_time(value: object) -> TypeGuard[int]:
    """Return True for epoch µs from 2001 to 2286; counts of rows and windows are far smaller."""
    return isinstance(value, int) and 10**15 <= value < 10**16


def _as_shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if _is_time(value):
        return clock.to_rfc3339(value)[:19] + "Z"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
