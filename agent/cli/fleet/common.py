"""Which fleet a command is for, and which of its databases."""

from __future__ import annotations

from pathlib import Path

import click

from agent.fleet import config as fleet_config
from agent.fleet.config import FleetConfig

fleet_option = click.option(
    "--dir", "folder", metavar="DIR", help="The fleet's folder; default $OUTSTATION_FLEET, ., /etc/outstation/fleet."
)
db_option = click.option(
    "--db", metavar="URL", help="Another database than fleet.toml names: a path, or postgresql://…"
)


def database_url(config: FleetConfig, db: str | None) -> str:
    """Where the fleet's tables are; `db` as it was given. Raises UsageError."""
    return fleet_config.resolve_database(db, Path.cwd()) if db else config.fleet.db
