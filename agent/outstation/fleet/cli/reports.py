"""`outstation fleet devices`, `alerts`, `audit`, `log gaps` and `log accept`: the fleet's state, from its database."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outstation.fleet import config as fleet_config
from outstation.fleet.cli.common import (
    database_options,
    device_option,
    is_without_command,
    open_for_reading,
    open_store,
    print_lines,
    processes_option,
    progress_bar,
)
from outstation.fleet.incidents import incidents
from outstation.fleet.incidents.incidents import IncidentFilter
from outstation.foundation import clock, durable_files
from outstation.foundation.cli.follow import Column, LinePrinter, emit_or_follow, follow_option
from outstation.foundation.cli.groups import SentenceGroup
from outstation.foundation.cli.options import DURATION, PATH, by_option, note_option
from outstation.foundation.cli.output import emit, print_table
from outstation.foundation.errors import UsageError
from outstation.foundation.text import pluralize
from outstation.protocol.alerts.incident import Incident, IncidentKey

if TYPE_CHECKING:
    from outstation.fleet.audit.checkpoint import CheckpointFolder
    from outstation.fleet.config import FleetConfig
    from outstation.fleet.database.store import FleetStore
    from outstation.protocol.wire.keys import PublicKey, SigningKey

_MAX_LISTED = 50
_FOLLOW_POLL_S = 2.0
_FOLLOWED_COLUMNS = {"time": 27, "device": 8, "task": 8, "status": 12, "severity": 8, "alert": 7, "summary": 0}


@click.group(
    "devices",
    cls=SentenceGroup,
    places={
        "cost": "outstation.fleet.cli.cost:cost",
        "enrol-list": "outstation.fleet.cli.enrolment.enrol:enrol_list",
        "remove": "outstation.fleet.cli.command:remove",
        "renew": "outstation.fleet.cli.enrolment.enrol:renew",
        "revoke": "outstation.fleet.cli.command:revoke",
        "token": "outstation.fleet.cli.enrolment.enrol:token",
        "watch": "outstation.fleet.cli.watch:watch",
    },
    invoke_without_command=True,
    epilog="Example: outstation fleet devices --dir acme",
)
@click.option("--all", "with_retired", is_flag=True, help="Devices that were removed, too.")
@database_options
@click.pass_context
def devices(ctx: click.Context, with_retired: bool, db: str | None, home: Path, as_json: bool) -> None:
    """List the enrolled devices with their state, clock and open alerts; let in, renew and shut out.

    The state is the one that the device sent last, or `revoked` if none of its keys may sign.
    """
    if not is_without_command(ctx, home):
        return
    config, store = open_for_reading(home, db)
    rows = [
        {
            "device": known["device"],
            "fleet": config.fleet.name,
            "key": known["key"],
            "state": known["state"] or "enrolled",
            "last_seen": known["last_seen"],
            "through": known["through"] or 0,
            "alerts": known["alerts"],
            "logs": known["logs"],
            "clock": known["clock"],
        }
        for known in store.devices(with_retired=with_retired)
    ]
    cells = [
        [
            *(r["device"], r["state"], r["clock"] or "unknown"),
            *(f"{r['last_seen'][:19]}Z" if r["last_seen"] else "never", r["through"], r["alerts"]),
            f"{r['logs']} at once!" if r["logs"] > 1 else r["logs"],
        ]
        for r in rows
    ]
    empty = "No device is enrolled yet: outstation fleet enrol DEVICE"
    columns = ["device", "state", "clock", "last seen", "through", "open alerts", "logs"]
    emit(rows, as_json, lambda: print_table(columns, cells, empty))


@click.command("accept", epilog="Example: outstation fleet log accept pi-07")
@click.argument("device")
@click.argument("log", required=False)
@database_options
def accept_log(device: str, log: str | None, db: str | None, home: Path, as_json: bool) -> None:
    """Accept one message log of DEVICE as the genuine one, if two live at once. Without LOG, list its logs.

    Alerts of the other logs are then no longer open. If one of them continues, the alert of two logs comes again.
    """
    if log is None:
        _, reader = open_for_reading(home, db, device)
        logs = reader.device_logs(device)
        columns = ["log", "last_seq", "since", "latest", "live"]
        cells = [[row[name] for name in columns[:4]] + ["yes" if row["live"] else "no"] for row in logs]
        empty = f"No message of {device} has arrived."
        emit(
            logs,
            as_json,
            lambda: print_table(["log", "through", "first message", "last message", "lives"], cells, empty),
        )
        return
    config = fleet_config.load(home)
    with open_store(config, db) as store:
        ended = store.accept_log(device, log, clock.now_rfc3339())
    document = {"device": device, "accepted": log, "ended": ended}
    emit(document, as_json, lambda: print_lines(f"{device}: log {log} is accepted; {len(ended)} other logs ended"))


@click.group(
    "alerts",
    cls=SentenceGroup,
    places={"notify": "outstation.fleet.cli.notify.commands:notify"},
    invoke_without_command=True,
    epilog="Example: outstation fleet alerts --device pi-07",
)
@click.option("--all", "include_cleared", is_flag=True, help="Cleared alerts, too.")
@follow_option
@device_option
@database_options
@click.pass_context
def alerts(
    ctx: click.Context,
    include_cleared: bool,
    follow: bool,
    device: str | None,
    db: str | None,
    home: Path,
    as_json: bool,
) -> None:
    """List the open alerts, oldest first, with their state: raised, acknowledged or muted.

    `acknowledge`, `mute` and `unmute` take the first letters of its `incident`, or the whole `id`. An acknowledgement
    ends when the alert becomes worse or comes back; a mute lasts until its time. With --follow, each alert that is
    raised, changed or cleared meanwhile is a line; with --json, too, a line of JSON.
    """
    if not is_without_command(ctx, home):
        return
    _, store = open_for_reading(home, db, device)
    if follow:
        _follow_alerts(store, device, as_json)
        return
    rows = _list_alerts(store, device, include_cleared)
    columns = ["incident", "time", "device", "task", "status", "severity", "alert", "summary"]
    cells = [[row[name][:19] + "Z" if name == "time" else row[name] or "" for name in columns] for row in rows]
    empty = "No alert was ever raised." if include_cleared else "No open alert."
    emit(rows, as_json, lambda: print_table(columns, cells, empty))


def _list_alerts(store: FleetStore, device: str | None, include_cleared: bool) -> list[dict[str, Any]]:
    wanted = IncidentFilter(open=None if include_cleared else True, device=device)
    handled = {i.key: i for i in incidents.list_incidents(store, wanted, now=clock.now_rfc3339())}
    if include_cleared:
        return [_add_handling(row, handled) for row in store.alerts(device, closed=True)]
    return [_add_handling(_newest_message(incident), handled) for incident in handled.values()]


def _follow_alerts(store: FleetStore, device: str | None, as_json: bool) -> None:
    """Print open alerts, then each that is raised, changed or cleared, until Ctrl-C."""
    columns = [Column(name, width) for name, width in _FOLLOWED_COLUMNS.items()]
    printer = LinePrinter(columns, lambda row: [row[name] or "" for name in _FOLLOWED_COLUMNS])
    followed = FollowedAlerts(lambda: _list_alerts(store, device, False))
    empty = "No open alert."
    emit_or_follow(followed.read_changes(), followed.read_changes, printer, empty, as_json, _FOLLOW_POLL_S)


class FollowedAlerts:
    """Open alerts as they were last read, and what has changed since."""

    def __init__(self, list_open: Callable[[], list[dict[str, Any]]]) -> None:
        self._list_open, self._open = list_open, dict[tuple[Any, ...], dict[str, Any]]()

    def read_changes(self) -> list[dict[str, Any]]:
        """Return the open alerts that are new or changed, and with status `cleared` those that are open no longer."""
        rows = {tuple(row[name] for name in ("source", "device", "log", "id")): row for row in self._list_open()}
        cleared = [{**row, "status": "cleared", "open": False} for key, row in self._open.items() if key not in rows]
        changed = [row for key, row in rows.items() if self._open.get(key) != row]
        self._open = rows
        return [*cleared, *changed]


def _newest_message(incident: Incident) -> dict[str, Any]:
    """Return the message of table alerts that raised an open incident last, as `FleetStore.alerts` does."""
    names = ("device", "task", "alert", "subject", "severity", "summary", "id", "log", "seq", "revision", "source")
    members = {name: getattr(incident, name) for name in names}
    return {**members, "state": "raised", "time": incident.updated, "open": True}


def _add_handling(row: dict[str, Any], handled: dict[IncidentKey, Incident]) -> dict[str, Any]:
    """Add operators' handling to a message of table alerts; `status` is that of the incident as a whole."""
    incident = handled.get((row["source"], row["device"], row["log"], row["id"]))
    members: dict[str, Any] = {"incident": None, "status": row["state"], "acknowledged": None, "muted": None}
    if incident is not None:
        members = {name: getattr(incident, name) for name in ("status", "acknowledged", "muted")}
        members["incident"] = incident.ref
        members["status"] = "cleared" if row["state"] == "cleared" else incident.status
    return {**row, **members}


def _incident_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command who does it and why, and the database."""
    for decorate in (database_options, note_option, by_option):
        command = decorate(command)
    return command


@alerts.command("acknowledge", epilog="Example: outstation fleet alerts acknowledge 3f9a --by eva --note 'on my way'")
@click.argument("ref", metavar="INCIDENT")
@_incident_options
def acknowledge(**options: Any) -> None:
    """Acknowledge an alert: no more reminders until it becomes worse or comes back."""
    _change("acknowledged", incidents.acknowledge, **options)


@alerts.command("mute", epilog="Example: outstation fleet alerts mute 3f9a --for '8 h'")
@click.argument("ref", metavar="INCIDENT")
@click.option("--for", "duration_s", type=DURATION, help="For this long, such as '8 h' or '3 d'.")
@click.option("--until", metavar="TIME", help="Until a time, RFC 3339, such as 2026-12-24T08:00:00Z.")
@_incident_options
def mute(duration_s: float | None, until: str | None, **options: Any) -> None:
    """Suppress notifications of an alert for a time; without one, until `unmute`."""
    if duration_s is not None and until is not None:
        raise UsageError("--for and --until name the same thing; give one of them")
    try:
        end = None if until is None else clock.to_rfc3339(clock.parse_rfc3339(until))
    except ValueError as error:
        raise UsageError(f"--until {until}: {error}; write 2026-12-24T08:00:00Z") from None
    if duration_s is not None:
        end = clock.to_rfc3339(clock.read().wall_us + round(duration_s * 1e6))
    _change("muted", incidents.mute, until=end, **options)


@alerts.command("unmute", epilog="Example: outstation fleet alerts unmute 3f9a")
@click.argument("ref", metavar="INCIDENT")
@_incident_options
def unmute(**options: Any) -> None:
    """End the mute of an alert."""
    _change("unmuted", incidents.unmute, **options)


def _change(
    action: str,
    change: Callable[..., None],
    *,
    ref: str,
    by: str,
    note: str,
    db: str | None,
    home: Path,
    as_json: bool,
    **members: str | None,
) -> None:
    """Change an incident, and say so; `members` are arguments of the change that JSON repeats."""
    with open_store(fleet_config.load(home), db) as store:
        incident = incidents.find_incident(store, ref, now=clock.now_rfc3339())
        change(store, incident, by=by, note=note, now=clock.now_rfc3339(), **members)
    _report(action, incident, {"by": by, "note": note, **members}, as_json)


def _report(action: str, incident: Incident, members: dict[str, Any], as_json: bool) -> None:
    until = f" until {members['until'][:19]}Z" if members.get("until") else ""
    line = f"{incident.ref} {action}{until}: {incident.device or 'the fleet'}: {incident.summary}"
    emit({"incident": incident.ref, "action": action, **members}, as_json, lambda: print_lines(line))


@click.command("gaps", epilog="Example: outstation fleet log gaps")
@device_option
@database_options
def gaps(device: str | None, db: str | None, home: Path, as_json: bool) -> None:
    """List missing messages, and messages that a device declared as evicted."""
    _, store = open_for_reading(home, db, device)
    rows = store.gaps(device)
    columns = ["device", "log", "from", "to", "declared"]
    cells = [[*(row[name] for name in columns[:4]), "evicted" if row["declared"] else "missing"] for row in rows]
    emit(rows, as_json, lambda: print_table([*columns[:4], "reason"], cells, "No message is missing."))


@click.command("audit", epilog="Example: outstation fleet audit --json")
@device_option
@click.option("--full", is_flag=True, help="Verify all signatures again, whatever the last checkpoint says.")
@click.option("--export", "export_folder", metavar="DIR", type=PATH,
              help="Verify this export, too: its files, and their rows by the signed messages.")  # fmt: skip
@processes_option
@database_options
def audit(
    device: str | None,
    full: bool,
    export_folder: Path | None,
    processes: int,
    db: str | None,
    home: Path,
    as_json: bool,
) -> None:
    """Verify every stored message: signatures, chain, gaps, coverage. Exit 1 if anything is wrong.

    An audit of all devices signs a checkpoint with the operator's key. The next one verifies what came since, and
    compares everything before with the checkpoint; a device where something changed is verified as a whole.
    """
    from outstation.fleet.audit import audit as audits

    config, store = open_for_reading(home, db, device)
    trusted, collectors = fleet_config.load_trusted_keys(config), fleet_config.load_collector_keys(config)
    checkpoint, signing = None, None if device or db else _open_checkpoint(home, config, trusted)
    with progress_bar("auditing", store.count_messages(device)) as advance:
        if signing is None:
            report = audits.audit(store, device, advance, trusted, processes, collectors)
        else:
            report, checkpoint = audits.audit_from_checkpoint(
                store, *signing, advance, trusted, processes, collectors, full=full
            )
    document = {**report.to_dict(), "checkpoint": checkpoint.time if checkpoint else None}
    if export_folder is not None:
        from outstation.fleet.export.check import check_export

        document["export"] = check_export(store, export_folder, config.fleet.name, collectors).to_dict()
        document["passed"] &= document["export"]["passed"]
    emit(document, as_json, lambda: print_lines(*_audit_lines(document)), passed=document["passed"])


def _open_checkpoint(
    home: Path, config: FleetConfig, trusted: Sequence[PublicKey]
) -> tuple[CheckpointFolder, SigningKey] | None:
    """Return the folder of the checkpoint and the operator's key; None if this user may not sign or write one."""
    from outstation.fleet.audit.checkpoint import CheckpointFolder
    from outstation.protocol.wire import keys

    path = home / "audit"
    try:
        key = keys.load_private(Path(config.operator.key_file))
        durable_files.make_folder(path)
    except (OSError, UsageError):
        return None
    return CheckpointFolder(path, config.fleet.name, trusted), key


def _audit_lines(report: dict[str, Any]) -> Iterable[str]:
    missing = [gap for gap in report["gaps"] if not gap["declared"]]
    messages, devices = pluralize(report["messages"], "message"), pluralize(report["devices"], "device")
    yield (
        f"{messages} of {devices}: {report['invalid_count']} invalid, "
        f"{len(missing)} gaps, {len(report['gaps']) - len(missing)} declared evictions, "
        f"{report['duplicates']} duplicates"
    )
    if report["checkpoint"] is not None:
        yield f"from the checkpoint of {report['checkpoint']} on; --full verifies every signature again"
    for entry in report["pruned"][:_MAX_LISTED]:
        yield (
            f"  {entry['device']} {entry['log']} up to seq {entry['through']}: {entry['count']} of {entry['table']} "
            f"went by retention, stated {entry['time']}"
        )
    for entry in report["invalid"][:_MAX_LISTED]:
        yield f"  {entry['device']} {entry['log']} seq {entry['seq']} {entry['reason']}"
    if any("table " in entry["reason"] for entry in report["invalid"]):
        yield "  tables differ from the messages: stop the collector, and `outstation fleet db rebuild` corrects them"
    for gap in missing[:_MAX_LISTED]:
        yield f"  {gap['device']} {gap['log']} seq {gap['from']}-{gap['to']} is missing"
    joined = [each for entry in report["coverage"] for each in entry["joined"].values()]
    if joined:
        proven = sum(each["messages"] - each["unproven"] for each in joined)
        yield f"joined rows: {proven} commitments, {sum(each['unproven'] for each in joined)} messages without one"
    for entry in report["replaced_secrets"][:_MAX_LISTED]:
        yield (
            f"  {entry['device']} {entry['log']} seq {entry['seq']}: its commitment.secret was replaced at "
            f"{entry['time']}, so commitments before cannot be verified"
        )
    if report["decisions"] or report["invalid_decisions"]:
        yield f"{report['decisions']} decisions about rollouts: {len(report['invalid_decisions'])} invalid"
    for entry in report["invalid_decisions"][:_MAX_LISTED]:
        where = f"{entry['rollout']} decision {entry['n']}" if entry["n"] is not None else entry["rollout"] or "fleet"
        yield f"  {where} {entry['reason']}"
    if exported := report.get("export"):
        yield (
            f"export {exported['folder']}: {exported['rows']} rows of {exported['messages']} messages in "
            f"{exported['files']} files, {exported['problem_count']} problems, {exported['pending']} messages not "
            f"exported yet, {exported['pruned']} pruned since, {exported['leftovers']} files of an interrupted run"
        )
        yield from (f"  {problem}" for problem in exported["problems"][:_MAX_LISTED])
    if not report["messages"]:
        yield "Nothing is collected yet: start `outstation fleet collect` and a device."
        yield "NOTHING TO VERIFY" if report["passed"] else "FAILED"
    else:
        yield "PASSED" if report["passed"] else "FAILED"
