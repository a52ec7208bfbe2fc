"""`outstation fleet alerts`: open alerts with what operators said about them; acknowledge, mute and unmute one."""

from __future__ import annotations

import getpass
from typing import Any

import click

from agent import clock
from agent.cli.fleet.common import (
    db_option,
    device_option,
    fleet_option,
    open_for_reading,
    open_store,
    print_lines,
)
from agent.cli.output import emit, json_option, print_table
from agent.errors import UsageError
from agent.fleet import config as fleet_config
from agent.fleet.database.incidents import IncidentKey
from agent.fleet.incidents import incidents
from agent.fleet.incidents.incidents import Incident, IncidentFilter
from agent.quantities import parse_duration


@click.group(
    "alerts",
    invoke_without_command=True,
    epilog="Example: outstation fleet alerts --device pi-07",
)
@click.option("--all", "include_cleared", is_flag=True, help="Cleared alerts, too.")
@device_option
@db_option
@fleet_option
@json_option
@click.pass_context
def alerts(
    ctx: click.Context, include_cleared: bool, device: str | None, db: str | None, folder: str | None, as_json: bool
) -> None:
    """List the open alerts, oldest first, with their state: raised, acknowledged or muted.

    An acknowledgement ends when the alert becomes worse or comes back; a mute lasts until its time.
    """
    if ctx.invoked_subcommand is not None:
        ctx.obj = (db, folder)
        return
    _, store = open_for_reading(folder, db, device)
    wanted = IncidentFilter(open=None if include_cleared else True, device=device)
    handled = {i.key: i for i in incidents.list_incidents(store, wanted, now=_now())}
    rows = [_add_handling(row, handled) for row in store.alerts(device, closed=include_cleared)]
    columns = ["incident", "time", "device", "task", "status", "severity", "alert", "summary"]
    cells = [[row[name] or "" for name in columns] for row in rows]
    empty = "No alert was ever raised." if include_cleared else "No open alert."
    headings = ["id", *columns[1:]]
    emit(rows, as_json, lambda: print_table(headings, cells, empty))


def _now() -> str:
    return clock.to_rfc3339(clock.read().wall_us)


def _add_handling(row: dict[str, Any], handled: dict[IncidentKey, Incident]) -> dict[str, Any]:
    """Add what operators said to a message of table alerts; `status` is that of the incident as a whole."""
    incident = handled.get((row["source"], row["device"], row["log"], row["id"]))
    members: dict[str, Any] = {"incident": None, "status": row["state"], "acknowledged": None, "muted": None}
    if incident is not None:
        members = {name: getattr(incident, name) for name in ("status", "acknowledged", "muted")}
        members["incident"] = incident.ref
        members["status"] = "cleared" if row["state"] == "cleared" else incident.status
    return {**row, **members}


_by_option = click.option("--by", metavar="NAME", default=getpass.getuser, help="Who says so; default: your user name.")
_note_option = click.option("--note", metavar="TEXT", default="", help="Why, for the next person who looks.")


@alerts.command("acknowledge", epilog="Example: outstation fleet alerts acknowledge 3f9a --by eva --note 'on my way'")
@click.argument("ref", metavar="ID")
@_by_option
@_note_option
@db_option
@fleet_option
@json_option
@click.pass_obj
def acknowledge(
    outer: tuple[str | None, str | None],
    ref: str,
    by: str,
    note: str,
    db: str | None,
    folder: str | None,
    as_json: bool,
) -> None:
    """Say that you take care of an alert: no more reminders until it becomes worse or comes back."""
    with open_store(*_opened(outer, db, folder)) as store:
        incident = incidents.find_incident(store, ref, now=_now())
        incidents.acknowledge(store, incident, by=by, note=note, now=_now())
    _report("acknowledged", incident, {"by": by, "note": note}, as_json)


@alerts.command("mute", epilog="Example: outstation fleet alerts mute 3f9a --for '8 h'")
@click.argument("ref", metavar="ID")
@click.option("--for", "duration", metavar="TIME", help="For this long, such as '8 h' or '3 d'.")
@click.option("--until", metavar="TIME", help="Until a time, RFC 3339, such as 2026-12-24T08:00:00Z.")
@_by_option
@_note_option
@db_option
@fleet_option
@json_option
@click.pass_obj
def mute(
    outer: tuple[str | None, str | None],
    ref: str,
    duration: str | None,
    until: str | None,
    by: str,
    note: str,
    db: str | None,
    folder: str | None,
    as_json: bool,
) -> None:
    """Let nobody be told of an alert for a time; without one, until `unmute`."""
    end = _parse_end(duration, until)
    with open_store(*_opened(outer, db, folder)) as store:
        incident = incidents.find_incident(store, ref, now=_now())
        incidents.mute(store, incident, until=end, by=by, note=note, now=_now())
    _report("muted", incident, {"by": by, "note": note, "until": end}, as_json)


@alerts.command("unmute", epilog="Example: outstation fleet alerts unmute 3f9a")
@click.argument("ref", metavar="ID")
@_by_option
@_note_option
@db_option
@fleet_option
@json_option
@click.pass_obj
def unmute(
    outer: tuple[str | None, str | None],
    ref: str,
    by: str,
    note: str,
    db: str | None,
    folder: str | None,
    as_json: bool,
) -> None:
    """End the mute of an alert."""
    with open_store(*_opened(outer, db, folder)) as store:
        incident = incidents.find_incident(store, ref, now=_now())
        incidents.unmute(store, incident, by=by, note=note, now=_now())
    _report("unmuted", incident, {"by": by, "note": note}, as_json)


def _opened(
    outer: tuple[str | None, str | None], db: str | None, folder: str | None
) -> tuple[fleet_config.FleetConfig, str | None]:
    """Return the config and the database; options may stand before the subcommand or after it."""
    return fleet_config.load(fleet_config.find_folder(folder or outer[1])), db or outer[0]


def _parse_end(duration: str | None, until: str | None) -> str | None:
    """Return the end of a mute as RFC 3339; None for no end. Raises UsageError."""
    if duration is not None and until is not None:
        raise UsageError("--for and --until name the same thing; give one of them")
    try:
        if duration is not None:
            return clock.to_rfc3339(clock.read().wall_us + round(parse_duration(duration) * 1e6))
        return None if until is None else clock.to_rfc3339(clock.parse_rfc3339(until))
    except ValueError as error:
        given = f"--until {until}" if duration is None else f"--for {duration}"
        raise UsageError(f"{given}: {error}; write 2026-12-24T08:00:00Z, or '8 h'") from None


def _report(action: str, incident: Incident, members: dict[str, Any], as_json: bool) -> None:
    until = f" until {members['until'][:19]}Z" if members.get("until") else ""
    line = f"{incident.ref} {action}{until}: {incident.device or 'the fleet'}: {incident.summary}"
    emit({"incident": incident.ref, "action": action, **members}, as_json, lambda: print_lines(line))
