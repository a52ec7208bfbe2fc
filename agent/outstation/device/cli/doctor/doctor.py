"""Command `outstation doctor`: what is wrong, and the fixes that it applies on request."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click
from msgspec.structs import asdict

from outstation.device import config
from outstation.device.bootstrap import device
from outstation.device.cli.check import STATE_COLORS, run_checks
from outstation.device.cli.doctor import archive, fixes, flash, journal, power
from outstation.device.config import Config
from outstation.device.store import cost
from outstation.device.store.store import Store
from outstation.foundation import input_files
from outstation.foundation.cli.options import PATH, SIZE, config_options
from outstation.foundation.cli.output import echo, echo_wrapped, emit
from outstation.foundation.errors import OutstationError, StorageError, UsageError
from outstation.foundation.owner import become_owner
from outstation.foundation.text import printable


@click.command(epilog="Example: outstation doctor --fix")
@click.option("--fix", is_flag=True, help="Apply the fixes; ask before each.")
@click.option("--yes", is_flag=True, help="With --fix: do not ask.")
@click.option("--archive", "archive_file", metavar="FILE", type=PATH,
              help="Write a .tar.gz for support, without secrets and readings.")  # fmt: skip
@click.option("--rating", type=SIZE, help='Bytes that the card endures by its data sheet, such as "20 TiB".')
@config_options
def doctor(
    fix: bool, yes: bool, archive_file: Path | None, rating: int | None, config_file: str | None, as_json: bool
) -> None:
    """Diagnose this device: problems with their fixes, flash wear and power.

    The checks are those of `outstation check`. Exit 1 if one fails, or if a fix was not applied.
    """
    if yes and not fix:
        raise UsageError("--yes needs --fix")
    # Root may read the journal; loading the config gives up root's rights.
    lines = {} if archive_file is None else journal.read()
    applied: list[fixes.Fix] = []
    if fix and os.geteuid() == 0:
        # Loading the config gives up root's rights, without which nobody changes root's files.
        file = input_files.find_config(config_file)
        conf = config.load(file)
        if conf.data_dir.is_dir() and conf.data_dir.stat().st_uid != 0:
            roots = [
                item for item in fixes.find_fixes(file, conf, _read_as_owner(conf)) if fixes.belongs_to_root(item.path)
            ]
            applied = [item for item in roots if (yes or _ask(item, as_json=as_json)) and _apply(item)]
    file, conf = device.load_config(config_file)
    written_per_day = _written_per_day(conf)
    open_fixes = list(fixes.find_fixes(file, conf, written_per_day))
    applied += [item for item in open_fixes if fix and (yes or _ask(item, as_json=as_json)) and _apply(item)]
    left = [item for item in open_fixes if item not in applied]
    if applied:
        file, conf = device.load_config(config_file)
    checks = [asdict(result) for result in run_checks(file, conf) if result.state != "ok"]
    wear = flash.describe_wear(written_per_day, _find_medium(conf), rating)
    document: dict[str, Any] = {
        "problems": checks,
        "applied": [_describe(item) for item in applied],
        "fixes": [_describe(item) for item in left],
        "flash": wear,
        "power": [asdict(measured) for measured in power.measure()],
        "archive": None,
    }
    if archive_file is not None:
        members = archive.write(archive_file, conf, checks, wear, lines)
        document["archive"] = {"file": str(archive_file), "members": members}
    passed = not left and all(check["state"] != "failed" for check in checks)
    emit(document, as_json, lambda: _print(document), passed=passed)


def _ask(item: fixes.Fix, *, as_json: bool) -> bool:
    if as_json or not sys.stdin.isatty():
        raise UsageError("--fix asks before each fix, which needs a terminal; add --yes to apply all")
    echo(printable(f"{item.name}: {item.problem}"))
    return click.confirm(printable(f"  {item.action}?"), default=False)


def _apply(item: fixes.Fix) -> bool:
    try:
        item.apply()
    except (OSError, StorageError) as error:
        raise UsageError(f"{item.action}: {getattr(error, 'strerror', None) or error}; run it with sudo") from None
    return True


def _describe(item: fixes.Fix) -> dict[str, str]:
    return {"name": item.name, "problem": item.problem, "action": item.action}


def _written_per_day(conf: Config) -> int | None:
    try:
        with Store.open_read_only(conf.data_dir) as store:
            spent = cost.read_process_cost(store.counters())
    except OutstationError:
        return None
    return round(spent.written_bytes / spent.seconds * 86_400) if spent.seconds else None


def _read_as_owner(conf: Config) -> int | None:
    """Return `_written_per_day` from a child process without root's rights: the store is another user's."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            become_owner(conf.data_dir)
            os.write(writer, str(_written_per_day(conf)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read(20)
    os.waitpid(child, 0)
    return int(text) if text.isdigit() else None


def _find_medium(conf: Config) -> flash.Medium | None:
    try:
        return flash.find_medium(conf.data_dir)
    except OSError:
        return None


def _print(document: dict[str, Any]) -> None:
    for check in document["problems"]:
        state = click.style(check["state"].ljust(7), fg=STATE_COLORS[check["state"]])
        _print_line(f"{state}  {printable(check['name'])}: {printable(check['detail'])}")
    if not document["problems"]:
        echo("All checks are ok.")
    for item in document["applied"]:
        _print_line(printable(f"fixed    {item['name']}: {item['action']}"))
    for item in document["fixes"]:
        _print_line(
            printable(f"fix      {item['name']}: {item['problem']}; `outstation doctor --fix` does: {item['action']}")
        )
    echo("")
    _print_line(f"flash    {_describe_wear(document['flash'])}")
    measured = [f"{item['watts']:.2f} W ({item['source']})" for item in document["power"]]
    _print_line(f"power    {printable('; '.join(measured) or power.UNKNOWN)}")
    if document["archive"] is not None:
        shown = printable(document["archive"]["file"])
        _print_line(f"archive  {shown}, without secrets and readings; look into it before you send it")


def _print_line(text: str) -> None:
    echo_wrapped(text, 9, in_terminal_only=True)


def _describe_wear(wear: dict[str, Any]) -> str:
    written, medium, years = wear["written_per_day"], wear["medium"], wear["years"]
    where = "not on a medium of this machine"
    if medium is not None:
        where = f"{medium['name']}, {medium['size_bytes'] / 1e9:.0f} GB"
        where += f", worn {medium['life_used']} by its own account" if medium["life_used"] else ""
    if written is None:
        return f"{where}; the daemon has not counted yet what it writes"
    day = f"{where}; the daemon writes {written / 1e6:,.0f} MB a day"
    if years is None:
        return f"{day}; give --rating to see the years left"
    assumption = f"if it endures {flash.ASSUMED_CYCLES} times its size; --rating takes its own"
    return f"{day}: {years:,.0f} years {assumption if wear['assumed'] else 'by its rating'}"
