"""Command `scripts/fuzz [TARGET]`; exit code 1 if a decoder broke, with each failing input in its own file."""

from __future__ import annotations

import importlib.util
import logging
import re
import subprocess
import sys
from pathlib import Path

import click

from scripts import fuzzing
from scripts.fuzzing import Target, sanitized
from scripts.fuzzing.explore import ROOT, Crash, attempt, explore
from scripts.packaging.kernel import CompilerError

FOLDER = ROOT / "build" / "fuzz"
HANGS_S = 60
KERNEL = "kernel"  # the target of C code


@click.command()
@click.argument("name", metavar="[TARGET]", required=False)
@click.option("--list", "listing", is_flag=True, help="List the targets.")
@click.option("--seconds", default=60, show_default=True, type=click.IntRange(1), help="Duration per target.")
@click.option("--seed", default=1, show_default=True, help="Seed; equal seeds try equal inputs.")
@click.option(
    "--input", "file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Run only this input."
)
@click.option("--plain", is_flag=True, help="Do not use atheris, even if installed.")
def main(name: str | None, listing: bool, seconds: int, seed: int, file: Path | None, plain: bool) -> None:
    """Fuzz all targets, or the one called TARGET. Example: scripts/fuzz message --seconds 600."""
    targets = fuzzing.load()
    if name is not None and name not in targets:
        raise click.UsageError(f"no target is named {name!r}; use one of {', '.join(targets)}")
    chosen = [targets[name]] if name else list(targets.values())
    if listing:
        for target in chosen:
            click.echo(f"{target.name:14} {target.says}")
        return
    if file is not None:
        sys.exit(reproduce(chosen, file))
    guided = not plain and importlib.util.find_spec("atheris") is not None
    crashes = []
    for target in chosen:
        run = with_sanitizers if target.name == KERNEL else with_atheris if guided else without
        crashes += run(target, seconds, seed)
    for crash in crashes:
        click.echo(f"{crash.target}: {crash.place}\n  {crash.write(FOLDER / 'crashes')}")
    sys.exit(1 if crashes else 0)


def reproduce(chosen: list[Target], file: Path) -> int:
    """Run one input, and return the exit code."""
    if len(chosen) != 1:
        raise click.UsageError("--input needs the TARGET that the input is for")
    crash = attempt(chosen[0], file.read_bytes())
    click.echo(crash.trace if crash else f"{chosen[0].name}: {file} raises no fault")
    return 1 if crash else 0


def without(target: Target, seconds: int, seed: int) -> list[Crash]:
    findings = explore(target, seed, seconds)
    click.echo(
        f"{target.name:14} {findings.runs:8} inputs, {len(findings.lines):4} lines, {len(findings.crashes)} crashes"
    )
    return list(findings.crashes.values())


def with_sanitizers(target: Target, seconds: int, seed: int) -> list[Crash]:
    try:
        summary, crashes = sanitized.run(target, seed, seconds, FOLDER / "sanitized")
    except CompilerError as error:
        click.echo(f"{target.name}: without sanitizers: {error}", err=True)
        return without(target, seconds, seed)
    click.echo(summary)
    return crashes


def with_atheris(target: Target, seconds: int, seed: int) -> list[Crash]:
    artifacts = FOLDER / "found"
    artifacts.mkdir(parents=True, exist_ok=True)
    before = set(artifacts.iterdir())
    options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-timeout={HANGS_S}", "-rss_limit_mb=4096"]
    command = [sys.executable, "-m", "scripts.fuzzing.guided", target.name, str(FOLDER / "corpus" / target.name)]
    done = subprocess.run(
        [*command, *options, f"-artifact_prefix={artifacts}/{target.name}-"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    last = re.findall(r"^#\d.*", done.stderr, re.MULTILINE)[-1:] or ["nothing was run"]
    click.echo(f"{target.name:14} atheris: {' '.join(last[0].split())}")
    new = [path for path in artifacts.iterdir() if path not in before]
    crashes = [attempt(target, path.read_bytes()) or _irreproducible(target, path, done.stderr) for path in new]
    if done.returncode != 0 and not new:
        raise click.ClickException(f"{target.name}: atheris ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return crashes


def _irreproducible(target: Target, path: Path, line: str) -> Crash:
    """Describe a crash that is not reproducible in this process: memory, time, or a fault in C."""
    return Crash(target.name, path.read_bytes(), f"{path.name}: under atheris only", line[-10_000:])


if __name__ == "__main__":
    logging.disable()
    main()
