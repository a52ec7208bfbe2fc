"""What all tests share: programs of the system that a test drives."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

from agent.fleet.database.store import FleetStore
from tests.kit.fleet_databases import DATABASES, fresh_in
from tests.kit.postgres import postgres_server, postgres_url

__all__ = ["postgres_server", "postgres_url"]

# How long an example takes is the machine's affair: what is found must depend neither on what else runs there nor on
# chance. `pytest --hypothesis-profile chance` looks at other examples each time.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("chance", patient, derandomize=False)
settings.register_profile("busy", patient, derandomize=True)
settings.load_profile("busy")

# A shell without job control starts background commands deaf to Ctrl-C, and their children with them: tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """`program("mosquitto")` is its path; without it the test is left out, except on CI, where it fails."""

    def find(name: str) -> str:
        # Debian keeps daemons where only root's PATH looks.
        path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if path is None:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{name} is not installed; see scripts/test")
        return path

    return find


@pytest.fixture(scope="module", params=DATABASES)
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], FleetStore]:
    """`fresh()` is an empty store of a fleet: once in SQLite, once in PostgreSQL."""
    return fresh_in(request, tmp_path_factory)
