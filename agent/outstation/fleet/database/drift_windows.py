"""Drift windows in the fleet database: messages of devices about closed drift windows."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from outstation.fleet.database.store import Devices, FleetStore, filter_devices

# When, until when and in how many windows each device was tested for drift.
_OBSERVED_PERIODS = """
    SELECT task, device, min("from"), max("to"), CAST(sum(window_count) AS BIGINT) FROM drift_windows
    WHERE state IN ('ok', 'drift') AND "to" BETWEEN ? AND ? GROUP BY task, device
"""

# In order of time. Reports of the same window are adjacent, in whatever log they arrived and against whatever site
# reference they were tested.
_DRIFT_WINDOWS = """
    SELECT device, task, window_count, first, last, "from", "to", state, reference, features, output, joint, estimate,
           windows
    FROM drift_windows WHERE {where} ORDER BY task, device, "from", first, last, "to", log, seq
"""

# One look into index drift_windows_by_time for each task: DISTINCT would read all of it.
_DRIFT_TASKS = """
    WITH RECURSIVE tasks (task) AS (
        SELECT min(task) FROM drift_windows
        UNION ALL SELECT (SELECT min(w.task) FROM drift_windows w WHERE w.task > tasks.task) FROM tasks
        WHERE tasks.task IS NOT NULL)
    SELECT task FROM tasks WHERE task IS NOT NULL ORDER BY task
"""
# By index drift_windows_by_time; the order is that of _DRIFT_WINDOWS.
_RECENT_DRIFT_WINDOWS = """
    SELECT * FROM (
        SELECT device, task, window_count, first, last, "from", "to", state, reference, features, output, joint,
               estimate, windows, log, seq
        FROM drift_windows WHERE task = ? AND device = ? AND "to" >= ? ORDER BY "to" DESC LIMIT ?) newest
    ORDER BY "from", first, last, "to", log, seq
"""


class DriftRow(msgspec.Struct, frozen=True, gc=False):
    """A drift message: a window, or a run of quiet ones. `reference` and what follows it are JSON text."""

    device: str
    task: str
    window_count: int
    first: int
    last: int
    begin: str
    end: str
    state: str
    reference: str
    features: str | None
    output: str | None
    joint: str | None
    estimate: str | None
    windows: str | None


def stream_drift_windows(
    store: FleetStore, *, task: str | None = None, devices: Devices = None, since: str | None = None
) -> Iterator[DriftRow]:
    """Return drift messages that ended at `since` or later, by task, device and time."""
    where, values = filter_devices(devices)
    # Only the conditions that are asked for, so that an index serves them.
    for condition, value in (("task = ?", task), ('"to" >= ?', since)):
        if value is not None:
            where, values = f"{where} AND {condition}", (*values, value)
    rows = store.stream(_DRIFT_WINDOWS.format(where=where), values)
    return (DriftRow(*row) for row in rows)


def load_recent_drift_windows(store: FleetStore, task: str, device: str, since: str, limit: int) -> list[DriftRow]:
    """Return the newest drift messages of a task that ended at `since` or later, in the order of all of them."""
    return [DriftRow(*row[:-2]) for row in store.fetch_all(_RECENT_DRIFT_WINDOWS, task, device, since, limit)]


def count_drift_messages(store: FleetStore) -> int:
    return int(store.fetch_all("SELECT count(*) FROM drift_windows")[0][0])


def list_drift_tasks(store: FleetStore) -> list[str]:
    return [task for (task,) in store.fetch_all(_DRIFT_TASKS)]


def load_observed_periods(store: FleetStore, since: str, until: str) -> list[tuple[str, str, str, str, int]]:
    """Return (task, device, from, to, drift windows) of each device tested between two times."""
    return store.fetch_all(_OBSERVED_PERIODS, since, until)
