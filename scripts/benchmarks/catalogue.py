"""Catalogue of published figures: the rows of BENCHMARKS.md, their order, and the best ratio that is possible.

Every other figure is on a page of details.
"""

from __future__ import annotations

import msgspec

MAIN = "BENCHMARKS.md"
DRIFT = "docs/internals/drift-benchmarks.md"
OTHER = "docs/internals/other-benchmarks.md"
# A table that a reader understands in a minute.
MOST_ROWS = 40

_DRIFT_NAMES = ("drift", "labelled-drift", "alarms")


class Figure(msgspec.Struct, frozen=True):
    """Row of the main table. `bound`: the best possible ratio, from measured parts; `why` names them."""

    name: str
    bound: float | None = None
    why: str = ""


_EVERY_VALUE = "each value read once by compiled code"
GROUPS: dict[str, tuple[Figure, ...]] = {
    "Stored readings to signed results": (
        Figure("batch", 0.62, "one read, one hash and one pass of statistics beside the interpreter"),
        Figure("kws", 0.87, "the same; the interpreter takes most"),
        Figure("ad01", 0.15, "hashing the rows takes as long as the model"),
        Figure("tabular", 0.8 / 1.5, _EVERY_VALUE),
        Figure("row at a time", 20.0, _EVERY_VALUE),
        Figure("backlog", 1.0, "the size of the backlog makes no difference"),
        Figure("confinement", 1.0, "no cost of the child process"),
        Figure("subprocess, 30 windows", 1.0, "no cost of the child process"),
        Figure("autotune", 1.0, "the best setting of a longer search"),
        Figure("model-run-kws"),
    ),
    "Drift detection": (
        Figure("drift, one prediction per row: cost", 0.4 / 0.8, _EVERY_VALUE),
        Figure("drift, one prediction per 100 rows: cost", 0.2 / 0.3, _EVERY_VALUE),
        Figure(
            "drift, one prediction per row, 500 rows at a time, more than ten times a second: cost",
            0.5 / 1.4,
            _EVERY_VALUE,
        ),
        Figure("drift-cost, adwin", 7.0, _EVERY_VALUE),
        Figure("drift, one prediction per row: memory"),
        Figure("drift, one prediction per 100 rows: memory"),
        Figure("drift, independent, one prediction per row: false alarms"),
        Figure("drift, AR(0.9), one prediction per row: false alarms"),
    ),
    "Readings to flash": (
        Figure("ingest"),
        Figure("ingest, JSON"),
        Figure("buffer"),
        Figure("storage", 1.0, "the values and times alone"),
        Figure("flash", 0.035, "one block a commit"),
        Figure("flash, WAL grown", 0.049, "one block a commit"),
    ),
    "Messages": (
        Figure("traffic"),
        Figure("traffic, jittered times"),
        Figure("traffic, compressed"),
        Figure("signing"),
        Figure("sealing"),
        Figure("uplink"),
    ),
    "The daemon": (
        Figure("startup", 1.0, "the imports alone"),
        Figure("idle"),
        Figure("memory, idle, without a model"),
        Figure("memory, idle"),
        Figure("memory, busy"),
        Figure("subprocess, memory"),
    ),
    "The collector": (
        Figure("collector", 1.0, "the steps by hand"),
        Figure("collector, postgresql", 1.0, "as fast as SQLite"),
        Figure("collector, two processes", 2.0, "twice one collector"),
    ),
}
FIGURES = {figure.name: figure for group in GROUPS.values() for figure in group}


def page_of(name: str) -> str:
    """Return the page that shows the figure `name`."""
    if name in FIGURES:
        return MAIN
    return DRIFT if name.partition(",")[0] in _DRIFT_NAMES or name.startswith("drift-") else OTHER
