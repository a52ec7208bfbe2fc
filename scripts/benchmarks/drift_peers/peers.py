"""Other drift detectors over the same rows as ours, each in its own process and environment."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import click
import msgspec
import numpy as np

from scripts.benchmarks.drift_peers import synthetic
from scripts.benchmarks.drift_peers.counting import Row
from scripts.benchmarks.drift_peers.synthetic import Change, Floats, Kind

ROOT = Path(__file__).parents[3]
VENV = os.environ.get("OUTSTATION_VENV", str(ROOT / ".venv"))


class Kit(msgspec.Struct, frozen=True):
    """A peer detector, its display name, and the amount of data it gets; slow detectors get less."""

    name: str
    called: str
    quiet: int = 50  # windows of each site
    trials: int = 2  # of each site and change
    timed: int = 20  # windows
    watched: int = 600  # quiet windows of each population
    home: str = "peers"  # its environment

    @property
    def python(self) -> Path:
        return environment(self.home) / "bin" / "python"


def environment(name: str = "peers") -> Path:
    return Path(f"{VENV}-{name}")


# Cost of summarizing a window and deciding about drift; whylogs only summarizes.
RIVER = Kit("adwin", "ADWIN (river)")
WHYLOGS = Kit("whylogs", "whylogs, profiles", timed=4, home="peers-whylogs")
EVIDENTLY = Kit("evidently", "Evidently's default", quiet=25, trials=1, timed=2, watched=120)
KITS = (
    Kit("ks", "KS, Bonferroni (SciPy)", timed=4, watched=120),
    Kit("psi", "PSI ≥ 0.1 (NumPy)"),
    RIVER,
    EVIDENTLY,
    Kit("nannyml", "NannyML's default"),
)
DLE = Kit("dle", "NannyML's DLE")
SITES = 8


def installed() -> bool:
    """Return True if the environment of the other detectors is there, and report on stderr if it is not."""
    marker = environment() / "peers.txt"
    if not marker.exists():
        click.echo(f"skipped: other detectors: {marker.parent} is missing; run scripts/setup peers", err=True)
    return marker.exists()


def write(file: Path, kind: Kind, changes: Sequence[Change], sites: int = SITES) -> None:
    """Write the input data of the peers for this kind."""
    most, trials = max(kit.quiet for kit in KITS), max(kit.trials for kit in KITS)
    text = json.dumps([{"name": change.name, "subjects": change.subjects} for change in changes])
    tables: dict[str, Any] = {"sites": np.int64(sites), "changes": np.str_(text)}
    for site in range(sites):
        tables[f"{site}/reference"] = synthetic.learning(kind, site)
        tables[f"{site}/quiet"] = synthetic.quiet(kind, site, most)
        for i, change in enumerate(changes):
            for trial in range(trials):
                tables[f"{site}/{i}/{trial}"] = synthetic.trial(kind, site, trial, change)
    np.savez(file, **tables)


def write_quiet(file: Path, sites: Sequence[tuple[Floats, Floats]], rows: int, levels: int) -> None:
    """Write sites without a change: learned rows (n, C) and later rows (m, C), in windows of `rows`.

    Column C - 1 holds one of `levels` classes, unless that is 0.
    """
    tables: dict[str, Any] = {"sites": np.int64(len(sites)), "rows": np.int64(rows), "levels": np.int64(levels)}
    for i, (learned, later) in enumerate(sites):
        tables |= {f"{i}/reference": learned, f"{i}/quiet": later}
    np.savez(file, **tables)


@contextmanager
def started(kit: Kit, data: Path | None) -> Iterator[Peer]:
    """Run a detector process until the context ends; for timing and memory, it processes `data`."""
    if not kit.python.exists():
        raise click.ClickException(f"{kit.called}: {kit.python.parents[1]} is missing; run scripts/setup peers")
    command = [str(kit.python), "-P", str(Path(__file__).with_name("peer.py")), kit.name]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True) as process,
    ):
        try:
            yield Peer(kit, data, process, output)
        finally:
            process.kill()


class Peer:
    """Process of one detector; `memory` is its memory in MB for the import and some data, if it got data."""

    def __init__(self, kit: Kit, data: Path | None, process: subprocess.Popen[str], output: IO[str]) -> None:
        """Start the process. Raises ClickException with its last output if it fails, as all methods do."""
        self.kit, self.data = kit, data
        self._process, self._stderr = process, output
        self._answer()
        self.memory: dict[str, float] = self.ask("memory", data) if data else {}

    def ask(self, request: str, data: Path, **more: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": request, "data": str(data), **more}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def row(self, data: Path, changes: Sequence[Change]) -> Row:
        """Return the results for the written data of these changes."""
        row, out = Row(self.kit.called), data.with_name(f"{self.kit.name}.npz")
        self.ask("flags", data, out=str(out), quiet=self.kit.quiet, trials=self.kit.trials)
        with np.load(out, allow_pickle=False) as flags:
            row.add_quiet(flags["quiet"])
            for i, change in enumerate(changes):
                for trial in flags[f"change{i}"]:
                    row.add(change.name, trial, [s for s in change.subjects if s < synthetic.COLUMNS])
        return row

    def count_quiet(self, data: Path) -> tuple[int, int]:
        """Return how many windows of `data`, written by `write_quiet`, were watched, and in how many it raised."""
        reply = self.ask("quiet", data, windows=self.kit.watched)
        return reply["windows"], reply["alarms"]

    def seconds_per_row(self) -> float:
        assert self.data is not None
        reply = self.ask("cost", self.data, windows=self.kit.timed)
        return float(reply["cpu_s"] / reply["rows"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._stderr.seek(0)
            last = self._stderr.read().strip()[-500:]
            raise click.ClickException(f"{self.kit.called} failed; its last output:\n{last}")
        answer: dict[str, Any] = json.loads(line)
        return answer
