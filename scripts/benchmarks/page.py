"""Committed benchmark results: the page in docs, and the ratios for regression checks."""

from __future__ import annotations

import json
import os
import platform
import re
import sqlite3
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from agent.model.inference import tuning
from agent.model.inference.runtime_name import runtime_name
from scripts.benchmarks import Result

ROOT = Path(__file__).parents[2]
PAGE, RATIOS = ROOT / "BENCHMARKS.md", Path(__file__).with_name("ratios.json")
# A ratio one third worse than the committed one is a regression on any machine.
FALLEN = 2 / 3

_HEAD = """\
# Benchmarks

`scripts/bench --write` measured these figures on {day} at commit {commit}. Each figure and its reference alternate in
the same run, and the median of several counts. Absolute figures apply to this machine at that time only.

{machine}

| figure | ours | reference | unit | ratio | target | |
|---|---:|---:|---|---:|---:|---|
"""
_ROW = re.compile(r"\| ([^|]+?) \| .*(?:met|\*\*missed\*\*) \|$")
_NOTE = re.compile(r"- \*\*(.+?)\*\*: ")


def write(results: Sequence[Result], worst: Sequence[Result], *, complete: bool) -> None:
    """Write the page, and the worst observed ratio of each result as the baseline for later runs.

    Figures that were not measured this time stay, unless the run was `complete`.
    """
    head = _HEAD.format(day=datetime.now(UTC).date(), commit=_commit(), machine=_machine())
    rows = {result.name: _row(result) for result in results}
    notes = {result.name: f"- **{result.name}**: {result.note}." for result in results}
    ratios = {result.name: round(result.ratio, 4) for result in worst if not result.limit}
    if not complete:
        rows = _figures(_ROW) | rows
        notes = _figures(_NOTE) | notes
        ratios = json.loads(RATIOS.read_text(encoding="utf-8")) | ratios
    figures = "\n".join([*rows.values(), "", *notes.values()])
    PAGE.write_text(f"{head}{figures}\n{_sections()}", encoding="utf-8")
    RATIOS.write_text(json.dumps(ratios, indent=2) + "\n", encoding="utf-8")


def write_section(title: str, text: str) -> None:
    """Replace the section `title` of the page, or append it."""
    page, mark = PAGE.read_text(encoding="utf-8"), f"\n## {title}\n"
    before, _, rest = page.partition(mark)
    _, following, after = rest.partition("\n## ")
    PAGE.write_text(f"{before.rstrip()}\n{mark}\n{text}\n{following}{after}", encoding="utf-8")


def find_regressions(results: Sequence[Result]) -> list[str]:
    """Return a sentence for each ratio that is one third worse than the committed one."""
    known = json.loads(RATIOS.read_text(encoding="utf-8"))
    lines = []
    for result in results:
        before = known.get(result.name)
        if before is None:
            continue
        retained_share = before / result.ratio if result.less else result.ratio / before
        if retained_share < FALLEN:
            lines.append(
                f"{result.name}: the ratio is {result.ratio:.3g}, it was {before:.3g}; worse by more than a third"
            )
    return lines


def middle(runs: Sequence[Sequence[Result]]) -> list[Result]:
    """Return, for each figure, the result of the run with the median ratio."""
    return [sorted(same, key=lambda result: result.ratio)[len(same) // 2] for same in zip(*runs, strict=True)]


def worst(runs: Sequence[Sequence[Result]]) -> list[Result]:
    return [
        max(same, key=lambda result: result.ratio if result.less else -result.ratio) for same in zip(*runs, strict=True)
    ]


def _row(result: Result) -> str:
    sign, verdict = ("≤", "met") if result.less else ("≥", "met")
    if not result.met:
        verdict = "**missed**"
    cells = (
        result.name,
        _number(result.ours),
        _number(result.reference),
        result.unit,
        f"{result.ratio:.3g}",
        f"{sign} {result.target:.3g}",
    )
    return f"| {' | '.join(cells)} | {verdict} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _figures(pattern: re.Pattern[str]) -> dict[str, str]:
    """Return the lines of the page that match, by the name of their figure."""
    lines = PAGE.read_text(encoding="utf-8").partition("\n## ")[0].splitlines()
    matches = [pattern.match(line) for line in lines]
    return {match[1]: match.string for match in matches if match}


def _sections() -> str:
    """Return the sections behind the figures: notes on missed targets, which are written by hand, and tables."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    _, mark, rest = text.partition("\n## ")
    return mark + rest


def _machine() -> str:
    load = os.getloadavg()[0]
    return (
        f"{tuning.describe_machine()}; {platform.system()}; Python {platform.python_version()}; "
        f"{runtime_name()}; SQLite {sqlite3.sqlite_version}; load {load:.1f} at the end."
    )


def _commit() -> str:
    completed = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return completed.stdout.strip() or "unknown"
