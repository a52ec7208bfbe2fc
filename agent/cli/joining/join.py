"""Command `outstation join`: join a fleet with the file that its operator answered a request with."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from agent.cli.output import echo, emit, json_option
from agent.errors import UsageError


@click.command(epilog="Example: outstation join pi-07.tar.gz --dir /etc/outstation")
@click.argument("enrolment", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--dir", "folder", default=".", type=click.Path(path_type=Path), help="Folder of the config and keys.")
@click.option("--data-dir", help="Folder of the store, for a device without a config; default DIR/data.")
@click.option("--replace", is_flag=True, help="Replace files that differ; each is kept as NAME.before-join.")
@json_option
def join(enrolment: Path, folder: Path, data_dir: str | None, replace: bool, as_json: bool) -> None:
    """Join a fleet with FILE, which `fleet enrol --bundle-out` made for this device.

    Readings, results and drift references stay, and stored messages are sent to the fleet, too. A config that nobody
    changed is replaced. Of a changed one, the id, the fleet, [broker], [collector], [operators] and [updates] are
    replaced, and your streams, tasks and other sections stay. Killed at any moment, run it again.
    """
    from agent.bootstrap import joining
    from agent.cli.device.init import is_untouched

    plan = joining.plan(enrolment, folder, is_untouched, data_dir)
    if plan.replaced and not replace:
        _ask(plan.folder, plan.replaced, plan.sections)
    moved = joining.apply(plan)
    document = {
        "file": str(folder / joining.CONFIG_FILE),
        "fleet": plan.fleet,
        "device": plan.device,
        "replaced": plan.replaced,
        "sections": plan.sections,
        "store_moved": moved,
    }
    lines = [f"{plan.device} joined fleet {plan.fleet}: {folder / joining.CONFIG_FILE}"]
    if plan.replaced:
        lines.append(f"The former {', '.join(plan.replaced)} are kept as *{joining.FORMER}.")
    if moved:
        lines.append("Its readings and results stay; the next start sends its stored messages to the fleet.")
    lines.append(f"Next: outstation check -c {folder / joining.CONFIG_FILE}")
    emit(document, as_json, lambda: echo("\n".join(lines)))


def _ask(folder: Path, replaced: list[str], sections: list[str]) -> None:
    """Ask whether files may be replaced. Raises UsageError if nobody can answer, or does not agree."""
    names = ", ".join(replaced)
    detail = f" (of the config: {', '.join(sections)}; the rest stays)" if sections else ""
    if not sys.stdin.isatty():
        raise UsageError(f"{folder}: {names} would be replaced{detail}; nothing was written; add --replace to agree")
    if not click.confirm(f"{folder}: replace {names}{detail}?", err=True):
        raise UsageError(f"{folder}: nothing was written")
