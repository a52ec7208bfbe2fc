"""Command `scripts/soak [NAME]`; exit code 1 if a check failed."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import click

from scripts.soaks import Result

# Each soak, whose module and function have its name, and its default duration in simulated hours; that of `fleet` is
# ten minutes of real time.
SOAKS = {"alert-truth": 2.0, "day": 24.0, "fleet": 1 / 6, "offline": 72.0}


@click.command()
@click.argument("name", required=False)
@click.option("--hours", type=float, help="Simulated hours; each soak has its own default.")
@click.option("--seed", default=1, show_default=True, help="Seed; equal seeds yield equal runs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(name: str | None, hours: float | None, seed: int, as_json: bool) -> None:
    """Run all soaks, or the one called NAME. Example: scripts/soak day --hours 3."""
    if name is not None and name not in SOAKS:
        raise click.UsageError(f"no soak is named {name!r}; use one of {', '.join(sorted(SOAKS))}")
    # Broken connections are part of every soak.
    logging.getLogger("outstation").setLevel(logging.ERROR)
    results: dict[str, Result] = {}
    for soak in [name] if name else sorted(SOAKS):
        results[soak] = _run(soak, hours, seed, as_json)
    if as_json:
        documents = [
            {"name": soak, "passed": r.passed, "problems": r.problems, **r.figures} for soak, r in results.items()
        ]
        click.echo(json.dumps(documents, indent=2))
    sys.exit(0 if all(result.passed for result in results.values()) else 1)


def _run(name: str, hours: float | None, seed: int, quiet: bool) -> Result:
    # Imported here: `--help` needs none of what a soak does.
    function = name.replace("-", "_")
    soak = getattr(import_module(f"scripts.soaks.{function}"), function)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"soak-{name}-") as folder:
        result: Result = soak(
            Path(folder), seed, hours or SOAKS[name], lambda line: None if quiet else click.echo(line)
        )
    if not quiet:
        click.echo(f"{name}: {'passed' if result.passed else 'FAILED'} in {time.monotonic() - began:.0f} s")
        for problem in result.problems:
            click.echo(f"    {problem}")
    return result


if __name__ == "__main__":
    main()
