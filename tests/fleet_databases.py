"""What is behind a fleet's store, for tests that look at it or disturb it."""

from __future__ import annotations

from agent.fleet.database.sqlite import Sqlite
from agent.fleet.store import FleetStore


def sqlite_of(store: FleetStore) -> Sqlite:
    assert isinstance(store._database, Sqlite)
    return store._database
