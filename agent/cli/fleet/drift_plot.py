"""The picture of `outstation fleet drift`: one device, or those of a fleet that are worth a look."""

from __future__ import annotations

import time
from collections.abc import Mapping

from msgspec.structs import replace

from agent.arrays import Ints
from agent.cli.device import drift_plot
from agent.cli.device.drift_plot import Scale
from agent.cli.fleet.drift_report import count, features, few
from agent.drift.baseline.reference import Reference
from agent.fleet.database.store import FleetStore
from agent.fleet.drift.survey import Group, Survey, course
from agent.model.bundle.bundle import Bundle
from agent.render import axes
from agent.render.drift_model import Picture

MOST_DRAWN = 6


def picture(
    store: FleetStore,
    found: Survey,
    device: str | None,
    since: str | None,
    references: Mapping[str, tuple[Bundle, Reference]],
) -> Picture:
    """Of the first task, under the reference that most devices have."""
    if not found.groups:
        empty = "No drift window was collected for this choice of task, device and time."
        return Picture("Drift of the fleet", "", [], [], "", "", [], [], empty)

    group = found.groups[0]
    scale = Scale.of(*references[group.shipped]) if group.shipped in references else Scale()
    drawn = _of_device(store, group, device, since, scale) if device else _of_fleet(store, group, since, scale)
    others = sum(len(other.devices) for other in found.groups[1:])
    if others == 0:
        return drawn
    more = f" · not drawn: {count(others, 'device')} of other tasks or references"
    return replace(drawn, subtitle=drawn.subtitle + more)


def _of_device(store: FleetStore, group: Group, device: str, since: str | None, scale: Scale) -> Picture:
    line = course(store, group, device, since=since, now_us=_now_us())
    learned = {name: shapes["insufficient"].counts for name, shapes in line.shapes.items() if "insufficient" in shapes}
    usual = learned or {name: part.counts for name, part in group.merged().items()}
    rows, estimates = drift_plot.of_one(line, scale, usual, {})
    alerts = [(a["alert"], a["summary"]) for a in store.alerts(device) if a["task"] == group.task]
    return Picture(
        title=f"Drift of {group.task} at {device}",
        subtitle=_subtitle(group.devices[device].windows, line.points[0].t[0], line.points[-1].t[1]),
        alerts=alerts,
        series=["mean"],
        dashes="spread",
        usual="while its site was learned" if learned else "the whole fleet",
        rows=rows,
        estimates=estimates,
    )


def _of_fleet(store: FleetStore, group: Group, since: str | None, scale: Scale) -> Picture:
    drawn = _worth_drawing(group)
    lines = {name: course(store, group, name, since=since, now_us=_now_us()) for name in drawn}
    fleet = {name: part.counts for name, part in group.merged().items()}
    apart = {(one.device, one.field) for one in group.standing_out()}
    shown: dict[str, dict[str, Ints]] = {
        d: {
            name: now[1].counts
            for name in fleet
            if (now := line.now(name)) is not None and (now[0] == "drift" or (d, name) in apart)
        }
        for d, line in lines.items()
    }
    states = features(group, None)

    def told(name: str) -> tuple[str, list[str]]:
        one = states[name]
        state = "fault" if one["fault"] else "drift" if one["drift"] else "ok"
        one["stands out"] = sorted(d for d, field in apart if field == name)
        return state, [f"{kind}: {few(one[kind])}" for kind in ("drift", "fault", "stands out") if one[kind]]

    rows, estimates = drift_plot.of_many(lines, scale, fleet, shown, told)
    alerts = [
        (a["alert"], f"{a['device'] or 'the fleet'}  {a['summary']}") for a in store.alerts() if a["task"] == group.task
    ]
    spans = [(line.points[0].t[0], line.points[-1].t[1]) for line in lines.values()]
    part = f" · {len(drawn)} of {len(group.devices)} devices drawn" if len(drawn) < len(group.devices) else ""
    return Picture(
        title=f"Drift of {group.task}, {count(len(group.devices), 'device')}",
        subtitle=_subtitle(group.windows, min(b for b, _ in spans), max(e for _, e in spans)) + part,
        alerts=alerts,
        series=drawn,
        dashes="",
        usual="all devices together",
        rows=rows,
        estimates=estimates,
    )


def _worth_drawing(group: Group) -> list[str]:
    """Those that drift or have a fault now, then those that stand out, then the others."""
    troubled = [e.device for e in group.moved() if e.ended is None]
    troubled += [name for name, one in group.devices.items() if one.last and one.last.state in ("drift", "fault")]
    order = [*troubled, *(s.device for s in group.standing_out()), *group.devices]
    return sorted(list(dict.fromkeys(order))[:MOST_DRAWN])


def _subtitle(windows: int, begin: int, end: int) -> str:
    return f"{windows} drift windows · {axes.moment(begin)} to {axes.moment(end)} UTC"


def _now_us() -> int:
    return time.time_ns() // 1000
