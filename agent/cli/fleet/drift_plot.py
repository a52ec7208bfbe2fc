"""The picture of `outstation fleet drift`: one device, or those of a fleet that are worth a look."""

from __future__ import annotations

import time
from collections.abc import Mapping

from msgspec.structs import replace

from agent.arrays import Ints
from agent.cli.device import drift_plot
from agent.cli.device.drift_plot import FieldScale
from agent.cli.fleet.drift_report import abbreviate_names, build_feature_documents, pluralize
from agent.drift.baseline.reference import Reference
from agent.fleet.database.store import FleetStore
from agent.fleet.drift.survey import DriftGroup, FleetDriftSummary, build_timeline
from agent.model.bundle.bundle import Bundle
from agent.render import axes
from agent.render.drift_model import DriftPlot

MAX_DRAWN = 6


def build_plot(
    store: FleetStore,
    survey: FleetDriftSummary,
    device: str | None,
    since: str | None,
    references: Mapping[str, tuple[Bundle, Reference]],
) -> DriftPlot:
    """Of the first task, under the reference that most devices have."""
    if not survey.groups:
        empty = "No drift window was collected for this choice of task, device and time."
        return DriftPlot("Drift of the fleet", "", [], [], "", "", [], [], empty)

    group = survey.groups[0]
    scale = (
        FieldScale.from_bundle(*references[group.shipped_reference])
        if group.shipped_reference in references
        else FieldScale()
    )
    drawn = _plot_device(store, group, device, since, scale) if device else _plot_fleet(store, group, since, scale)
    others = sum(len(other.devices) for other in survey.groups[1:])
    if others == 0:
        return drawn
    more = f" · not drawn: {pluralize(others, 'device')} of other tasks or references"
    return replace(drawn, subtitle=drawn.subtitle + more)


def _plot_device(store: FleetStore, group: DriftGroup, device: str, since: str | None, scale: FieldScale) -> DriftPlot:
    line = build_timeline(store, group, device, since=since, now_us=_now_us())
    learned = {
        name: shapes["insufficient"].counts for name, shapes in line.histograms.items() if "insufficient" in shapes
    }
    usual = learned or {name: part.counts for name, part in group.merge_fields().items()}
    rows, estimates = drift_plot.plot_device(line, scale, usual, {})
    alerts = [(a["alert"], a["summary"]) for a in store.alerts(device) if a["task"] == group.task]
    return DriftPlot(
        title=f"Drift of {group.task} at {device}",
        subtitle=_subtitle(group.devices[device].windows, line.points[0].t[0], line.points[-1].t[1]),
        alerts=alerts,
        series_names=["mean"],
        dashed_label="spread",
        reference_label="while its site was learned" if learned else "the whole fleet",
        rows=rows,
        estimates=estimates,
    )


def _plot_fleet(store: FleetStore, group: DriftGroup, since: str | None, scale: FieldScale) -> DriftPlot:
    drawn = _select_devices(group)
    lines = {name: build_timeline(store, group, name, since=since, now_us=_now_us()) for name in drawn}
    fleet = {name: part.counts for name, part in group.merge_fields().items()}
    apart = {(one.device, one.field) for one in group.find_outliers()}
    shown: dict[str, dict[str, Ints]] = {
        d: {
            name: now[1].counts
            for name in fleet
            if (now := line.latest(name)) is not None and (now[0] == "drift" or (d, name) in apart)
        }
        for d, line in lines.items()
    }
    states = build_feature_documents(group, None)

    def describe_field(name: str) -> tuple[str, list[str]]:
        one = states[name]
        state = "fault" if one["fault"] else "drift" if one["drift"] else "ok"
        one["stands out"] = sorted(d for d, field in apart if field == name)
        return state, [
            f"{kind}: {abbreviate_names(one[kind])}" for kind in ("drift", "fault", "stands out") if one[kind]
        ]

    rows, estimates = drift_plot.plot_devices(lines, scale, fleet, shown, describe_field)
    alerts = [
        (a["alert"], f"{a['device'] or 'the fleet'}  {a['summary']}") for a in store.alerts() if a["task"] == group.task
    ]
    spans = [(line.points[0].t[0], line.points[-1].t[1]) for line in lines.values()]
    part = f" · {len(drawn)} of {len(group.devices)} devices drawn" if len(drawn) < len(group.devices) else ""
    return DriftPlot(
        title=f"Drift of {group.task}, {pluralize(len(group.devices), 'device')}",
        subtitle=_subtitle(group.windows, min(b for b, _ in spans), max(e for _, e in spans)) + part,
        alerts=alerts,
        series_names=drawn,
        dashed_label="",
        reference_label="all devices together",
        rows=rows,
        estimates=estimates,
    )


def _select_devices(group: DriftGroup) -> list[str]:
    """Those that drift or have a fault now, then those that stand out, then the others."""
    troubled = [e.device for e in group.ordered_episodes() if e.ended is None]
    troubled += [
        name for name, one in group.devices.items() if one.last_window and one.last_window.state in ("drift", "fault")
    ]
    order = [*troubled, *(s.device for s in group.find_outliers()), *group.devices]
    return sorted(list(dict.fromkeys(order))[:MAX_DRAWN])


def _subtitle(windows: int, begin: int, end: int) -> str:
    return f"{windows} drift windows · {axes.format_time(begin)} to {axes.format_time(end)} UTC"


def _now_us() -> int:
    return time.time_ns() // 1000
