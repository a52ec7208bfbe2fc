"""`outstation fleet drift`: drift of the whole fleet, and its outlier devices."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from outstation.fleet.cli import drift_report as report
from outstation.fleet.cli.common import database_options, open_for_reading, processes_option, progress_bar
from outstation.foundation.cli.options import MOMENT, PATH, dark_option, plot_option
from outstation.foundation.cli.output import echo_wrapped, emit, require_plot_format
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import BadBundle, UsageError
from outstation.foundation.text import printable

if TYPE_CHECKING:
    from outstation.ml.drift.baseline.reference import Reference
    from outstation.ml.model.bundle.bundle import Bundle


@click.command("drift", epilog="Example: outstation fleet drift --task exercise --since 7d --plot drift.svg")
@click.option("--device", metavar="D", help="Only this device, compared with its fleet.")
@click.option("--task", metavar="T", help="Only this task.")
@click.option(
    "--since", type=MOMENT, help='Only windows since "24 h", "7 d", 2026-11-24 or 2026-11-24T22:18:00Z; default all.'
)
@plot_option
@dark_option
@click.option("--bundle", "bundles", multiple=True, metavar="BUNDLE", type=PATH,
              help="Compare with the reference of this bundle; built-in bundles are known.")  # fmt: skip
@processes_option
@database_options
def drift(
    device: str | None,
    task: str | None,
    since: str | None,
    plot: Path | None,
    dark: bool,
    bundles: tuple[Path, ...],
    processes: int,
    db: str | None,
    home: Path,
    as_json: bool,
) -> None:
    """Report drift per task and field over all devices: fleet-wide drift, first onset and outlier devices."""
    from outstation.fleet.database.drift_windows import count_drift_messages, list_drift_tasks
    from outstation.fleet.drift.survey import summarize_device, summarize_drift

    require_plot_format(plot)
    now_us = time.time_ns() // 1000
    _, store = open_for_reading(home, db, device)
    with progress_bar("reading", count_drift_messages(store)) as advance:
        survey = summarize_drift(store, task=task, since=since, now_us=now_us, progress=advance, processes=processes)
    if task is not None and not survey.groups and (tasks := list_drift_tasks(store)) and task not in tasks:
        raise UsageError(f"no device reported drift of a task {task!r}{did_you_mean(task, tasks)}")
    alone = None
    if device is not None:
        survey.groups = [group for group in survey.groups if device in group.devices]
        alone = summarize_device(store, device, task=task, since=since, now_us=now_us)
    known = load_references(bundles)
    document = report.build_document(survey, alone, {digest: reference for digest, (_, reference) in known.items()})
    if plot is not None:
        from outstation.fleet.cli.drift_plot import build_plot
        from outstation.ml.plots.drift_plot import save

        save(build_plot(store, survey, device, since, known), plot, dark=dark)
        document["plot"] = str(plot)

    def print_report() -> None:
        for line in report.format_lines(document):
            # Bold comes from the report; all other control characters are escaped.
            plain = click.unstyle(line)
            shown = click.style(printable(plain), bold=True) if plain != line else printable(line)
            echo_wrapped(shown, 4, in_terminal_only=True)

    emit(document, as_json, print_report)


def load_references(bundle_paths: Iterable[Path]) -> dict[str, tuple[Bundle, Reference]]:
    """Return bundle and drift reference by the reference's digest, also of built-in bundles. Raises BadBundle."""
    from outstation.ml.drift.baseline.reference import Reference
    from outstation.ml.model.bundle import builtin, bundle

    known = {}
    shipped = [path for path in sorted(builtin.bundles_dir().iterdir()) if (path / "manifest.json").exists()]
    for path in [*shipped, *bundle_paths]:
        content = bundle.read(path, None)
        if "reference.json" not in content.files:
            raise BadBundle(f"{path}: has no drift reference (reference.json); pack it with reference data")
        reference = Reference.from_json(content.files["reference.json"])
        known[reference.digest] = (content, reference)
    return known
