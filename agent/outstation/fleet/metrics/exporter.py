"""Exporter: metrics as text, rendered from the fleet database at most once in some seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from outstation.fleet.dashboard.state.fleet_state import FleetState
from outstation.fleet.dashboard.state.reader import ReopenedStore
from outstation.fleet.database.dashboard import messages as statements
from outstation.fleet.database.interface import Connection
from outstation.fleet.database.store import FleetStore
from outstation.fleet.metrics.device_families import FleetTotals, build_families
from outstation.foundation import clock
from outstation.foundation.errors import OutstationError

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Several Prometheus servers and a person with curl share one reading.
MIN_INTERVAL_S = 5.0
# Refreshes of the state in one reading; each reads some hundred devices.
_MAX_REFRESHES = 100
_MAX_REFUSALS = 100_000

Families = Callable[[], Iterable[Metric]]


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def render(families: Iterable[Metric]) -> bytes:
    """Return the families in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families([*families]))
    return generate_latest(registry)


def load_totals(db: Connection) -> FleetTotals:
    """Return the sums of a snapshot."""
    refusals: dict[str, int] = {}
    for row in statements.load_refusals(db, _MAX_REFUSALS):
        refusals[str(row["reason"])] = refusals.get(str(row["reason"]), 0) + int(row["count"])
    return FleetTotals(statements.count_missing(db), refusals)


class DatabaseExporter:
    """Metrics of a database that it opens itself, read-only, in the thread that calls `read`."""

    def __init__(self, fleet: str, location: str, own_families: Families) -> None:
        """`own_families`: further families, built anew for each reading."""
        self._fleet, self._own_families = fleet, own_families
        self._state, self._store = FleetState(), ReopenedStore(location)
        self._text, self._read_s = b"", float("-inf")

    def read(self) -> bytes:
        """Return the metrics; of a database that cannot be read, the last ones and `outstation_database_up` 0."""
        if time.monotonic() - self._read_s < MIN_INTERVAL_S:
            return self._text
        totals = None
        try:
            totals = self._store.read(self._refresh)
        except OutstationError as error:
            logger.warning("metrics: %s", error)
            # After an outage it may be another database.
            self._state.forget()
        state = self._state
        families = build_families(
            self._fleet, state.devices.values(), state.collector_alerts, totals, state.read_us, clock.read().wall_us
        )
        self._text = render([*self._own_families(), *families])
        # From its end: a slow database is not read without a pause.
        self._read_s = time.monotonic()
        return self._text

    def close(self) -> None:
        """Close the database; the next `read` opens it again."""
        self._store.close()

    def _refresh(self, store: FleetStore) -> FleetTotals:
        for _ in range(_MAX_REFRESHES):
            with store.snapshot() as db:
                self._state.refresh(db)
            if self._state.is_complete:
                break
        with store.snapshot() as db:
            return load_totals(db)
