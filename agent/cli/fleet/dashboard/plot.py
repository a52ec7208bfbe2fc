"""Drift plot of one device for the dashboard, drawn as by `outstation fleet drift --plot`."""

from __future__ import annotations

from functools import lru_cache

from agent import clock
from agent.cli.fleet.drift import load_references
from agent.cli.fleet.drift_plot import build_plot
from agent.drift.baseline.reference import Reference
from agent.fleet.database.store import FleetStore
from agent.fleet.drift.survey import summarize_device
from agent.model.bundle.bundle import Bundle
from agent.render import drift_plot


def render_device_drift(store: FleetStore, device: str, task: str, since: str | None, dark: bool) -> str:
    """Return the plot of one task as SVG; `since` is an RFC 3339 time."""
    survey = summarize_device(store, device, task=task, since=since, now_us=clock.read().wall_us)
    return drift_plot.render_drift(build_plot(store, survey, device, since, _builtin_references()), dark=dark)


@lru_cache(1)
def _builtin_references() -> dict[str, tuple[Bundle, Reference]]:
    return load_references(())
