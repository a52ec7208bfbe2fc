"""Fixtures of fleet tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from outstation.fleet.database.store import FleetStore


@pytest.fixture
def store(fresh: Callable[[], FleetStore]) -> Iterator[FleetStore]:
    """Open an empty store, in SQLite and in PostgreSQL."""
    with fresh() as opened:
        yield opened
