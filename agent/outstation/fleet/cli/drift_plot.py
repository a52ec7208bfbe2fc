"""Drift plot of a fleet for `outstation fleet drift --plot`: one device, or the most conspicuous ones."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from outstation.fleet.cli.drift_report import build_feature_documents
from outstation.fleet.database.store import FleetStore
from outstation.fleet.drift.survey import DriftGroup, FleetDriftSummary, build_timeline
from outstation.foundation import clock
from outstation.foundation.arrays import Ints
from outstation.foundation.render import axes
from outstation.foundation.render.drift_model import DriftPlot
from outstation.foundation.text import list_names, pluralize
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.plots import drift_plot
from outstation.ml.plots.drift_plot import FieldScale

MAX_DRAWN_DEVICES = 6


def build_plot(
    store: FleetStore,
    survey: FleetDriftSummary,
    device: str | None,
    since: str | None,
    references: Mapping[str, tuple[Bundle, Reference]],
) -> DriftPlot:
    """Build the plot of the first task, under the reference of most devices."""
    if not survey.groups:
        empty = "No drift window was collected for this task, device and time."
        return DriftPlot("Drift of the fleet", "", [], [], "", "", [], [], empty)

    group = survey.groups[0]
    scale = (
        FieldScale.from_bundle(*references[group.shipped_reference])
        if group.shipped_reference in references
        else FieldScale()
    )
    plot = _plot_device(store, group, device, since, scale) if device else _plot_fleet(store, group, since, scale)
    others = sum(len(other.devices) for other in survey.groups[1:])
    if others == 0:
        return plot
    more = f" · not drawn: {pluralize(others, 'device')} of other tasks or references"
    return replace(plot, subtitle=plot.subtitle + more)


def _plot_device(store: FleetStore, group: DriftGroup, device: str, since: str | None, scale: FieldScale) -> DriftPlot:
    timeline = build_timeline(store, group, device, since=since, now_us=clock.read().wall_us)
    learned = {
        name: states["insufficient"].counts for name, states in timeline.histograms.items() if "insufficient" in states
    }
    reference_counts = learned or {name: part.counts for name, part in group.merge_fields().items()}
    usual = "the whole fleet" if len(group.devices) > 1 else "all windows of this device"
    rows, estimates = drift_plot.plot_device(timeline, scale, reference_counts, {})
    alerts = [(a["alert"], a["summary"]) for a in store.alerts(device) if a["task"] == group.task]
    return DriftPlot(
        title=f"Drift of {group.task} at {device}",
        subtitle=_subtitle(group.devices[device].windows, timeline.points[0].t[0], timeline.points[-1].t[1]),
        alerts=alerts,
        series_names=["mean"],
        dashed_label="spread",
        reference_label="learning windows of this site" if learned else usual,
        rows=rows,
        estimates=estimates,
    )


def _plot_fleet(store: FleetStore, group: DriftGroup, since: str | None, scale: FieldScale) -> DriftPlot:
    selected = _select_devices(group)
    now_us = clock.read().wall_us
    timelines = {name: build_timeline(store, group, name, since=since, now_us=now_us) for name in selected}
    fleet_counts = {name: part.counts for name, part in group.merge_fields().items()}
    outliers = {(outlier.device, outlier.field) for outlier in group.find_outliers()}
    histograms: dict[str, dict[str, Ints]] = {
        device: {
            name: latest[1].counts
            for name in fleet_counts
            if (latest := timeline.latest(name)) is not None and (latest[0] == "drift" or (device, name) in outliers)
        }
        for device, timeline in timelines.items()
    }
    fields = build_feature_documents(group)

    def describe_field(name: str) -> tuple[str, list[str]]:
        devices = {
            "drift": fields[name]["drift"],
            "fault": fields[name]["fault"],
            "outlier": sorted(device for device, field in outliers if field == name),
        }
        state = "fault" if devices["fault"] else "drift" if devices["drift"] else "ok"
        return state, [f"{kind}: {list_names(names, 4)}" for kind, names in devices.items() if names]

    rows, estimates = drift_plot.plot_devices(timelines, scale, fleet_counts, histograms, describe_field)
    alerts = [
        (a["alert"], f"{a['device'] or 'the fleet'}  {a['summary']}") for a in store.alerts() if a["task"] == group.task
    ]
    spans = [(timeline.points[0].t[0], timeline.points[-1].t[1]) for timeline in timelines.values()]
    part = f" · {len(selected)} of {len(group.devices)} devices drawn" if len(selected) < len(group.devices) else ""
    return DriftPlot(
        title=f"Drift of {group.task}, {pluralize(len(group.devices), 'device')}",
        subtitle=_subtitle(group.windows, min(b for b, _ in spans), max(e for _, e in spans)) + part,
        alerts=alerts,
        series_names=selected,
        dashed_label="",
        reference_label="all devices together",
        rows=rows,
        estimates=estimates,
    )


def _select_devices(group: DriftGroup) -> list[str]:
    """Select devices with drift or a fault first, then outliers, then others."""
    order = [episode.device for episode in group.ordered_episodes() if episode.ended is None]
    order += [
        name
        for name, device in group.devices.items()
        if device.last_window and device.last_window.state in ("drift", "fault")
    ]
    order += [*(outlier.device for outlier in group.find_outliers()), *group.devices]
    return sorted(list(dict.fromkeys(order))[:MAX_DRAWN_DEVICES])


def _subtitle(windows: int, begin: int, end: int) -> str:
    return f"{windows} drift windows · {axes.format_time(begin)} to {axes.format_time(end)} UTC"
