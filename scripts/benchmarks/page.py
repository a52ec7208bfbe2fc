"""Committed benchmark results: `figures.jsonl`, the pages that show them, and the ratios for regression checks.

`python -m scripts.benchmarks.page` writes the pages again from `figures.jsonl`, for instance after a merge.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sqlite3
import subprocess
import textwrap
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec

from outstation.ml.model.inference import tuning
from outstation.ml.model.inference.runtime_name import runtime_name
from scripts.benchmarks import Result, Section, catalogue

ROOT = Path(__file__).parents[2]
FIGURES, RATIOS = (Path(__file__).with_name(name) for name in ("figures.jsonl", "ratios.json"))
# A ratio one third worse than the committed one is a regression on any machine.
FALLEN = 2 / 3
LINE = 119  # characters

_MAIN_HEAD = """\
# Benchmarks

Outstation beside the same work by hand or by another library. Both sides take turns in one run, and the median counts.
**{met} of {count} targets are met.**

- **ratio** is ours divided by the reference; **target** says how large (≥) or small (≤) it should be.
- *CPU* counts processor time, *wall* also waiting. **other clock** is the ratio by the other one of the two.
- **bound** is the best ratio that is possible: [what each figure compares](#what-is-compared) says why.
- SQLite has `journal_mode=WAL` and `synchronous=FULL` on both sides. The WAL starts empty and grows, as after any
  program's start; in rows with "WAL grown" both sides fill it before the measurement.

{machines}. Absolute figures apply to this machine at that time. More figures:
[drift detection](docs/internals/drift-benchmarks.md), [others](docs/internals/other-benchmarks.md).

"""
_DETAIL_HEADS = {
    catalogue.DRIFT: """\
# Drift detection, measured

False alarms and delays on made data and on recordings, beside other libraries. [BENCHMARKS.md](../../BENCHMARKS.md)
explains the columns and has the cost.

""",
    catalogue.OTHER: """\
# Other benchmarks

Figures that [BENCHMARKS.md](../../BENCHMARKS.md) leaves out, optimizations that were tried, and a large fleet.

""",
}
_MAIN_COLUMNS = "| figure | ours | reference | unit | ratio | other clock | bound | target | |"
_DETAIL_COLUMNS = "| figure | ours | reference | unit | ratio | target | | what is compared |"


class Figure(Result, frozen=True):
    """Result with the day, commit, load and machine of its measurement."""

    measured: str = ""
    machine: str = ""


def write(results: Sequence[Result], worst: Sequence[Result], *, complete: bool) -> None:
    """Write the pages, and the worst observed ratio of each result as the baseline for later runs.

    Figures that were not measured this time stay, unless the run was `complete`.
    """
    measured = describe_run()
    figures = {} if complete else read_figures()
    for result in results:
        figures[result.name] = Figure(**msgspec.structs.asdict(result), measured=measured, machine=describe_hardware())
    ratios = {} if complete else json.loads(RATIOS.read_text(encoding="utf-8"))
    ratios |= {result.name: round(result.ratio, 4) for result in worst if not result.limit}
    # A figure is a line, so that measurements of different figures merge.
    lines = (msgspec.json.encode(figures[name]) + b"\n" for name in sorted(figures))
    FIGURES.write_bytes(b"".join(lines))
    RATIOS.write_text(json.dumps(ratios, indent=2) + "\n", encoding="utf-8")
    render()


def describe_run() -> str:
    """Return day, commit and load of a measurement that ends now."""
    return f"{datetime.now(UTC).date()} at {_commit()}, load {os.getloadavg()[0]:.0f}"


def read_figures() -> dict[str, Figure]:
    """Return the committed figures by name, in the order of their names."""
    if not FIGURES.exists():
        return {}
    figures = (msgspec.json.decode(line, type=Figure) for line in FIGURES.read_bytes().splitlines())
    return {figure.name: figure for figure in figures}


def render() -> None:
    """Write the figures of every page; its sections stay."""
    for path, text in render_pages().items():
        (ROOT / path).write_text(text, encoding="utf-8")


def render_pages() -> dict[str, str]:
    """Return the text of every page by its path, with the sections that it has now."""
    by_page: dict[str, list[Figure]] = {page: [] for page in (catalogue.MAIN, *_DETAIL_HEADS)}
    for figure in read_figures().values():
        by_page[catalogue.page_of(figure.name)].append(figure)
    heads = {path: head + _detail_table(by_page[path]) for path, head in _DETAIL_HEADS.items()}
    heads[catalogue.MAIN] = _main_table({figure.name: figure for figure in by_page[catalogue.MAIN]})
    return {path: f"{head}\n{_sections(ROOT / path)}" for path, head in heads.items()}


def write_section(section: Section) -> None:
    """Replace a section of its page, or append it, and write its files."""
    path, mark = ROOT / section.page, f"\n## {section.title}\n"
    before, _, rest = path.read_text(encoding="utf-8").partition(mark)
    _, following, after = rest.partition("\n## ")
    path.write_text(f"{before.rstrip()}\n{mark}\n{section.text.rstrip()}\n{following}{after}", encoding="utf-8")
    for name, text in section.files.items():
        (ROOT / name).write_text(text, encoding="utf-8")
    for name, item in section.bullets.items():
        _replace_item(ROOT / name, item)


def _replace_item(path: Path, item: str) -> None:
    """Replace the list item that begins with the same words in bold. Raises ClickException if there is none."""
    begin = item[: item.index("**", item.index("**") + 2)]
    wrapped = textwrap.fill(item, LINE, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    text, count = re.subn(
        rf"^{re.escape(begin)}.*?(?=^\S|^$|\Z)",
        lambda _: f"{wrapped}\n",
        path.read_text(encoding="utf-8"),
        flags=re.MULTILINE | re.DOTALL,
    )
    if not count:
        raise click.ClickException(f"{path}: no list item begins with {begin!r}; add one")
    path.write_text(text, encoding="utf-8")


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


def _main_table(figures: dict[str, Figure]) -> str:
    met, machines = sum(f.met for f in figures.values()), sorted({f.machine for f in figures.values()})
    lines = [_MAIN_HEAD.format(met=met, count=len(figures), machines="; ".join(machines)) + _table_head(_MAIN_COLUMNS)]
    notes = ["", "## What is compared", ""]
    for title, group in catalogue.GROUPS.items():
        listed = [(row, figures[row.name]) for row in group if row.name in figures]
        if listed:
            lines.append(f"| **{title}** |" + " |" * 8)
        for row, figure in listed:
            other = "" if figure.other_ratio is None else f"{figure.other_ratio:.3g}"
            bound = "" if row.bound is None else f"{row.bound:.2g}"
            lines.append(_row(figure, (other, bound), ()))
            why = f" Bound: {row.why}." if row.why else ""
            notes.append(f"- **{figure.name}** ({figure.measured}): {figure.note}.{why}")
    return "\n".join([*lines, *notes, ""])


def _detail_table(figures: Iterable[Figure]) -> str:
    lines = [_row(figure, (), (f"{figure.note}; {figure.measured}",)) for figure in figures]
    return "\n".join([_table_head(_DETAIL_COLUMNS), *lines, ""])


def _table_head(columns: str) -> str:
    names = columns.strip("|").split("|")
    text_columns = {"figure", "unit", "what is compared", ""}
    return f"{columns}\n|{'|'.join('---' if name.strip() in text_columns else '---:' for name in names)}|"


def _row(figure: Figure, before_target: Sequence[str], after: Sequence[str]) -> str:
    clock = f" {figure.clock}" if figure.clock else ""
    cells = (
        figure.name,
        _number(figure.ours),
        _number(figure.reference),
        figure.unit,
        f"{figure.ratio:.3g}{clock}",
        *before_target,
        f"{'≤' if figure.less else '≥'} {figure.target:.3g}",
        "met" if figure.met else "**missed**",
        *after,
    )
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _sections(path: Path) -> str:
    """Return the sections behind the figures: text that is written by hand, and what benchmarks wrote."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    _, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return "".join(section for section in sections if not section.startswith("## What is compared\n"))


def describe_hardware() -> str:
    """Return processor, system, interpreter and libraries."""
    return (
        f"{tuning.describe_machine()}; {platform.system()}; Python {platform.python_version()}; "
        f"{runtime_name()}; SQLite {sqlite3.sqlite_version}"
    )


def _commit() -> str:
    completed = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return completed.stdout.strip() or "unknown"


if __name__ == "__main__":
    render()
