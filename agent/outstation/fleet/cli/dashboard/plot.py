"""Drift plot of one device for the dashboard, drawn as by `outstation fleet drift --plot`."""

from __future__ import annotations

from functools import lru_cache

from outstation.fleet.cli.drift import load_references
from outstation.fleet.cli.drift_plot import build_plot
from outstation.fleet.database.store import FleetStore
from outstation.fleet.drift.survey import summarize_device
from outstation.foundation import clock
from outstation.foundation.render import drift_plot
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.model.bundle.bundle import Bundle


def render_device_drift(store: FleetStore, device: str, task: str, since: str | None, dark: bool) -> str:
    """Return the plot of one task as SVG; `since` is an RFC 3339 time."""
    survey = summarize_device(store, device, task=task, since=since, now_us=clock.read().wall_us)
    return drift_plot.render_drift(build_plot(store, survey, device, since, _builtin_references()), dark=dark)


@lru_cache(1)
def _builtin_references() -> dict[str, tuple[Bundle, Reference]]:
    return load_references(())
