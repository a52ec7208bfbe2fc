"""Section [retention] of fleet.toml: how long messages, and rows of some tables, stay in the fleet database."""

from __future__ import annotations

from outstation.foundation.config.quantities import Duration
from outstation.foundation.config.toml_files import Section

# Rollouts, alerts and the collector itself need the last hours of each device.
MIN_RETENTION_S = 86_400.0


class Retention(Section, frozen=True):
    """Age at which [`fleet db prune`](../guides/collector.md#retention) removes rows, counted from their arrival.

    ```toml
    [retention]
    messages = "365 d"
    results = "90 d"
    ```

    Without a key rows stay. A pruned message takes its rows along.
    """

    messages: Duration | None = None
    """Signed messages."""
    results: Duration | None = None
    """Results."""
    drift_windows: Duration | None = None
    """Drift windows."""
    samples: Duration | None = None
    """Sealed readings that devices sent."""
