"""What is behind a fleet's store, for tests that look at it or disturb it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agent.fleet.database.sqlite import Sqlite
from agent.fleet.store import FleetStore

# Values of `request.param` for `fresh_in`.
DATABASES = ("sqlite", "postgresql")


def sqlite_of(store: FleetStore) -> Sqlite:
    assert isinstance(store._database, Sqlite)
    return store._database


def fresh_in(request: pytest.FixtureRequest, factory: pytest.TempPathFactory) -> Callable[[], FleetStore]:
    """What gives an empty database of the kind `request.param`."""
    if request.param == "sqlite":
        return lambda: FleetStore(factory.mktemp("db") / "fleet.db")
    url = request.getfixturevalue("postgres_server").database()
    FleetStore(url).close()
    return lambda: emptied(url)


def emptied(url: str) -> FleetStore:
    """Making the tables takes longer than most tests."""
    store = FleetStore(url)
    with store.transaction() as db:
        names = db.execute("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()").fetchall()
        listed = ", ".join(name for (name,) in names if name not in ("migrations", "meta"))
        db.execute(f"TRUNCATE {listed} RESTART IDENTITY")
        db.execute("UPDATE meta SET value = 0")
    return store
