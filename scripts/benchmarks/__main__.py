"""Command `scripts/bench [NAME …] [--quick | --write] [--json]`; exit code 1 on a missed target or a regression."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

import click

from scripts import benchmarks
from scripts.benchmarks import BENCHMARKS, QUICK, Report, Result, page

_MORE_TRIES = 2
# Number of runs whose median becomes the committed ratio; one run does not show the usual ratio.
_WRITTEN_RUNS = 3


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option(
    "--quick", is_flag=True, help="Run the short benchmarks; exit 1 only if a ratio is a third worse than committed."
)
@click.option("--write", is_flag=True, help="Update BENCHMARKS.md and the committed ratios for --quick.")
@click.option(
    "--rows",
    type=click.IntRange(min=100),
    help="Rows per model in model-run (default 1000), messages in fleet-database (50000), windows in alarms (3000).",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the finished parts of alarms and the data of fleet-database here, and continue from these.",
)
def main(
    names: tuple[str, ...], as_json: bool, quick: bool, write: bool, rows: int | None, folder: Path | None
) -> None:
    """Run all benchmarks, or those called NAME. Example: scripts/bench signing."""
    benchmarks.rows, benchmarks.folder = rows, folder
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name != "__main__":
            importlib.import_module(f"{benchmarks.__name__}.{module.name}")
    for name in names:
        if name not in BENCHMARKS:
            raise click.UsageError(f"no benchmark is named {name!r}; use one of {', '.join(sorted(BENCHMARKS))}")
    results: list[Result] = []
    worst: list[Result] = []
    for benchmark_name in names or sorted(QUICK if quick else BENCHMARKS):
        try:
            report = measured(benchmark_name)
            # Interference from another process rarely repeats, so a slow result is measured up to three times.
            for _ in range(_MORE_TRIES if quick else 0):
                if not page.find_regressions(report.results):
                    break
                report = measured(benchmark_name)
        except click.ClickException as lacking:
            if names:
                raise
            click.echo(f"{benchmark_name}: skipped: {lacking.message}", err=True)
            continue
        runs = [report.results]
        if write and benchmark_name in QUICK:
            runs += [measured(benchmark_name).results for _ in range(_WRITTEN_RUNS - 1)]
            worst += page.worst(runs)
        results += page.middle(runs)
        if write and report.section:
            page.write_section(report.section)
        if not as_json:
            click.echo(report.text)
    if as_json:
        click.echo(json.dumps([document(result) for result in results], indent=2))
    if write:
        page.write(results, worst, complete=not names)
    if quick:
        lost = page.find_regressions(results)
        for sentence in lost:
            click.echo(sentence, err=True)
        sys.exit(1 if lost else 0)
    sys.exit(0 if all(result.met for result in results) else 1)


def measured(name: str) -> Report:
    """Run one benchmark. Raises ClickException if a requirement is missing."""
    report = BENCHMARKS[name]()
    if isinstance(report, Report):
        return report
    results = [report] if isinstance(report, Result) else report
    return Report(results, "\n".join(map(line, results)))


def line(result: Result) -> str:
    verdict = "met" if result.met else "MISSED"
    other = "" if result.other_ratio is None else f", {result.other_ratio:.2f} by the other clock"
    clocks = f" {result.clock}{other}" if result.clock else ""
    return (
        f"{result.name:24} {result.ours:14,.5g} {result.unit:12} reference {result.reference:14,.5g}   "
        f"× {result.ratio:.2f}{clocks} (target {result.target:g}: {verdict})\n{'':24} {result.note}"
    )


def document(result: Result) -> dict[str, Any]:
    return {
        "name": result.name,
        "ours": round(result.ours, 3),
        "reference": round(result.reference, 3),
        "unit": result.unit,
        "ratio": round(result.ratio, 3),
        "clock": result.clock,
        "other_ratio": result.other_ratio and round(result.other_ratio, 3),
        "target": result.target,
        "met": result.met,
        "note": result.note,
    }


if __name__ == "__main__":
    main()
