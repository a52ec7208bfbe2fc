"""Coverage-guided exploration: an input that reaches a new line of agent/outstation/ becomes a seed."""

from __future__ import annotations

import hashlib
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from scripts.fuzzing import Target
from scripts.fuzzing.mutate import mutated

ROOT = Path(__file__).parents[2]
_OURS = str(ROOT / "agent" / "outstation")
# No decoder needs this long for a few kilobytes.
SLOW_S = 3.0
# Tracing dominates the cost, so only a fraction of the inputs is traced.
_TRACED = 4


class TooSlow(Exception):
    """Raised if a decoder took longer than `SLOW_S`."""


@dataclass(frozen=True, slots=True)
class Crash:
    """An input that broke its target; `place` distinguishes faults."""

    target: str
    data: bytes
    place: str
    trace: str

    def write(self, folder: Path) -> Path:
        """Write the input, and a text file with the command that reproduces it."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.target}-{hashlib.sha256(self.data).hexdigest()[:12]}"
        path.write_bytes(self.data)
        again = f"scripts/fuzz {self.target} --input {path}"
        path.with_suffix(".txt").write_text(f"{self.place}\n\nAgain: {again}\n\n{self.trace}", encoding="utf-8")
        return path


@dataclass(slots=True)
class Exploration:
    """Outcome of a target's run, with its crashes by place."""

    runs: int = 0
    lines: set[tuple[str, int]] = field(default_factory=set)
    crashes: dict[str, Crash] = field(default_factory=dict)


def explore(target: Target, seed: int, seconds: float = float("inf"), runs: int = sys.maxsize) -> Exploration:
    """Run the seeds, then mutations, for `seconds` or `runs`. The same seed yields the same inputs."""
    random, seeds, findings = Random(f"{target.name} {seed}"), target.seeds(), Exploration()
    end = time.monotonic() + seconds
    waiting = list(seeds)
    while waiting or (findings.runs < runs and time.monotonic() < end):
        sound = bool(waiting)
        data = waiting.pop() if sound else mutated(seeds, random, target.longest)
        before = len(findings.lines)
        crash = attempt(target, data, findings.lines if sound or findings.runs % _TRACED == 0 else None)
        findings.runs += 1
        if crash is not None:
            findings.crashes.setdefault(crash.place, crash)
        elif not sound and len(findings.lines) > before:
            seeds.append(data)
    return findings


def attempt(target: Target, data: bytes, lines: set[tuple[str, int]] | None = None) -> Crash | None:
    """Run the target once, and add the lines of agent/outstation/ that it reached to `lines`."""
    try:
        if lines is None:
            run(target, data)
        else:
            _traced(target, data, lines)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
        return Crash(target.name, data, place, traceback.format_exc())
    return None


def run(target: Target, data: bytes) -> None:
    """Run the target once. Warnings and more than `SLOW_S` of CPU time count as errors."""
    start = time.process_time()
    with warnings.catch_warnings(action="error"):
        target.run(data)
    took = time.process_time() - start
    if took > SLOW_S:
        raise TooSlow(f"{took:.1f} s for {len(data)} bytes")


def _traced(target: Target, data: bytes, lines: set[tuple[str, int]]) -> None:
    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(_OURS):
            return None
        lines.add((name, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run(target, data)
    finally:
        sys.settrace(before)
