"""`outstation fleet drift`: drift of the whole fleet, and who stands out from it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import click

from agent import clock
from agent.cli.fleet import drift_report as report
from agent.cli.fleet.common import db_option, fleet_option
from agent.cli.output import dark_option, emit, json_option, plot_option, require_plot_format
from agent.config import parse_duration
from agent.errors import UsageError
from agent.text import printable
from agent.toml_files import did_you_mean


@click.command("drift", epilog="Example: outstation fleet drift --task exercise --since 7d --plot drift.svg")
@click.option("--device", metavar="D", help="Only this device, beside what its fleet comes to.")
@click.option("--task", metavar="T", help="Only this task.")
@click.option("--since", metavar="TIME", help='"24 h", "7 d", 2026-11-24 or 2026-11-24T22:18:00Z; default everything.')
@plot_option
@dark_option
@click.option("--bundle", "bundles", multiple=True, metavar="BUNDLE", type=click.Path(path_type=Path),
              help="Whose reference to compare with and draw; known for bundles that ship with the agent.")  # fmt: skip
@db_option
@fleet_option
@json_option
def drift(
    device: str | None,
    task: str | None,
    since: str | None,
    plot: Path | None,
    dark: bool,
    bundles: tuple[Path, ...],
    db: str | None,
    folder: str | None,
    as_json: bool,
) -> None:
    """Drift per task and field over all devices: what moved on many, what moved first, who is unlike the others."""
    from agent.cli.fleet import fleet_references
    from agent.cli.fleet import group as commands
    from agent.fleet.drift.survey import summarize_drift

    require_plot_format(plot)
    now_us = time.time_ns() // 1000
    begin = None if since is None else _parse_since(since, now_us)
    _, store = commands.open_for_reading(folder, db, device)
    with commands.progress("reading", store.count_drift_windows()) as advance:
        found = summarize_drift(store, task=task, since=begin, now_us=now_us, progress=advance)
    if task is not None and not found.groups and (tasks := store.drift_tasks()) and task not in tasks:
        raise UsageError(f"no device reported drift of a task {task!r}{did_you_mean(task, tasks)}")
    if device is not None:
        found.groups = [group for group in found.groups if device in group.devices]
    known = fleet_references.load_known(bundles)
    document = report.build_document(found, device, {digest: reference for digest, (_, reference) in known.items()})
    if plot is not None:
        from agent.cli.device import drift_plot as drift_picture
        from agent.cli.fleet import drift_plot as fleet_drift_picture

        drift_picture.save(fleet_drift_picture.build_plot(store, found, device, begin, known), plot, dark=dark)
        document["plot"] = str(plot)
    emit(document, as_json, lambda: _print_lines(report.format_lines(document)))


def _parse_since(text: str, now_us: int) -> str:
    """RFC 3339 of a moment, or of so long ago. Raises UsageError."""
    try:
        return clock.to_rfc3339(now_us - int(float(parse_duration(text)) * 1e6))
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f'--since {text!r}: say how long ago ("24 h", "7 d") or when (2026-11-24T22:18:00Z)') from None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return clock.to_rfc3339(int(moment.timestamp() * 1e6))


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        # Bold is ours; all else was escaped with the line.
        plain = click.unstyle(line)
        click.echo(click.style(printable(plain), bold=True) if plain != line else printable(line))
