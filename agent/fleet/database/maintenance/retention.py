"""Section [retention] of fleet.toml: how long messages, and rows of some tables, stay in the fleet database."""

from __future__ import annotations

from agent.quantities import Duration
from agent.toml_files import Section

# Rollouts, alerts and the collector itself need the last hours of each device.
MIN_RETENTION_S = 86_400.0


class Retention(Section, frozen=True):
    """Retention of each table, counted from arrival; forever without a key. A pruned message takes its rows along."""

    messages: Duration | None = None
    results: Duration | None = None
    drift_windows: Duration | None = None
    samples: Duration | None = None
