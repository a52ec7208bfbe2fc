"""`outstation fleet dashboard user`: accounts of the dashboard."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from outstation.fleet import config as fleet_config
from outstation.fleet.cli.common import database_options, open_for_reading, open_store
from outstation.foundation import clock
from outstation.foundation.cli.output import echo, emit, print_table
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import UsageError

_ADD_ACCOUNT = "outstation fleet dashboard user add NAME --role admin"

_role_option = click.option(
    "--role",
    type=click.Choice(["viewer", "operator", "admin"]),
    default="viewer",
    show_default=True,
    help="viewer reads, operator decides, admin manages accounts.",
)


@click.group("user")
def user() -> None:
    """Manage the accounts of the dashboard."""


@user.command("add", epilog="Example: outstation fleet dashboard user add ada --role operator")
@click.argument("name")
@_role_option
@click.option("--no-password", is_flag=True, help="Only a proxy signs this account in.")
@database_options
def add(name: str, role: str, no_password: bool, db: str | None, home: Path, as_json: bool) -> None:
    """Create an account, or give an existing one another role. The password is asked for, or read from stdin."""
    from outstation.fleet.dashboard.security import passwords
    from outstation.fleet.database.dashboard import accounts

    passwords.check_account(name, role)
    config = fleet_config.load(home)
    with open_store(config, db) as store:
        with store.snapshot() as reading:
            known = accounts.load_user(reading, name)
        password = known[1] if known else None
        if known is None and not no_password:
            password = passwords.hash_password(_read_password())
        now = clock.now_rfc3339()
        with store.transaction() as writing:
            accounts.save_user(writing, name, role, password, now)
            # What its sessions may do changes at once, but a person with another role signs in again.
            accounts.revoke_sessions(writing, name, now)
    changed = "is now" if known else "was created as"
    emit({"user": name, "role": role, "created": known is None}, as_json, lambda: echo(f"{name} {changed} {role}"))


@user.command("password", epilog="Example: outstation fleet dashboard user password ada")
@click.argument("name")
@database_options
def password(name: str, db: str | None, home: Path, as_json: bool) -> None:
    """Set another password and end all sessions. The password is asked for, or read from stdin."""
    from outstation.fleet.dashboard.security import passwords
    from outstation.fleet.database.dashboard import accounts

    config = fleet_config.load(home)
    with open_store(config, db) as store:
        with store.snapshot() as reading:
            known = accounts.load_user(reading, name)
            names = [row["name"] for row in accounts.load_users(reading)]
        if known is None:
            raise _unknown(name, names)
        hashed, now = passwords.hash_password(_read_password()), clock.now_rfc3339()
        with store.transaction() as writing:
            accounts.save_user(writing, name, known[0], hashed, now)
            accounts.revoke_sessions(writing, name, now)
    emit({"user": name}, as_json, lambda: echo(f"{name} has another password; all its sessions ended"))


@user.command("remove", epilog="Example: outstation fleet dashboard user remove ada")
@click.argument("name")
@database_options
def remove(name: str, db: str | None, home: Path, as_json: bool) -> None:
    """Remove an account and end its sessions."""
    from outstation.fleet.database.dashboard import accounts

    config = fleet_config.load(home)
    with open_store(config, db) as store, store.transaction() as writing:
        names = [row["name"] for row in accounts.load_users(writing)]
        if not accounts.delete_user(writing, name, clock.now_rfc3339()):
            raise _unknown(name, names)
    emit({"user": name, "removed": True}, as_json, lambda: echo(f"{name} was removed; its sessions ended"))


@user.command("list", epilog="Example: outstation fleet dashboard user list")
@database_options
def list_users(db: str | None, home: Path, as_json: bool) -> None:
    """List the accounts with their roles and sessions."""
    from outstation.fleet.database.dashboard import accounts

    _, store = open_for_reading(home, db)
    with store.snapshot() as reading:
        users, sessions = accounts.load_users(reading), accounts.count_sessions(reading, clock.now_rfc3339())
    rows: list[dict[str, Any]] = [{**row, "sessions": sessions.get(row["name"], 0)} for row in users]
    cells = [
        [r["name"], r["role"], "password" if r["has_password"] else "proxy only", r["sessions"], r["changed"]]
        for r in rows
    ]
    columns = ["name", "role", "signs in by", "sessions", "changed"]
    emit(rows, as_json, lambda: print_table(columns, cells, f"No account yet: {_ADD_ACCOUNT}"))


def _read_password() -> str:
    if sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    return sys.stdin.readline().rstrip("\r\n")


def _unknown(name: str, names: list[str]) -> UsageError:
    return UsageError(f"there is no account {name!r}{did_you_mean(name, names, f'no account yet: {_ADD_ACCOUNT}')}")
