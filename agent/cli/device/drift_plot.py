"""From what is known of drift to a picture of it, and the picture to a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.arrays import Ints
from agent.drift.baseline.reference import Reference
from agent.drift.reporting.parsed_message import Subject, apart
from agent.drift.reporting.timeline import Timeline
from agent.errors import UsageError
from agent.model.bundle.bundle import Bundle
from agent.render import axes, drift_plot, png
from agent.render.drift_model import Curve, Estimate, Picture, Row, Spell

_STATISTICS = ("mean", "spread")
_OTHERS = ("output", "score", "joint")


class Scale(msgspec.Struct, frozen=True):
    """What a bundle says of its fields: bounds of bins and units."""

    bounds: Mapping[str, Sequence[float]] = msgspec.field(default_factory=dict)
    units: Mapping[str, str] = msgspec.field(default_factory=dict)

    @classmethod
    def of(cls, bundle: Bundle, reference: Reference) -> Scale:
        units = dict(zip(bundle.manifest.input.fields, bundle.manifest.input.units, strict=False))
        return cls(dict(zip(reference.fields, reference.bounds.tolist(), strict=True)), units)


def save(picture: Picture, file: Path, *, dark: bool) -> None:
    """Raises UsageError where it cannot be written."""
    svg = drift_plot.drift(picture, dark=dark)
    data = svg.encode() if file.suffix == ".svg" else png.from_svg(svg)
    part = file.with_name(file.name + ".part")
    try:
        part.write_bytes(data)
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UsageError(f"--plot {file}: cannot be written: {error.strerror}") from None


def of_one(
    line: Timeline, scale: Scale, usual: Mapping[str, Ints], limits: Mapping[str, float]
) -> tuple[list[Row], list[Estimate]]:
    """Rows and the estimate of one device: mean and spread apart."""
    rows = []
    for name in _subjects(line):
        state = _state(line, name)
        now = line.now(name)
        known = usual.get(name)
        shown = [(0, now[1].counts.tolist())] if now is not None else []
        notes = [
            f"since {axes.moment(begin)[5:]}" for begin, _, on in line.spells(name, state) if on and state == "drift"
        ]
        if now is not None and known is not None and now[0] != "insufficient":
            sizes = apart(known, now[1].counts)
            notes += [f"JS {sizes['js']:.2f} · KS {sizes['ks']:.2f}"]
        elif name == "output":
            notes += ["which answers it gives"]
        elif name == "score":
            notes += ["how certain it is"]
        elif name == "joint":
            notes += ["fields together"]
        statistics = _STATISTICS if name in scale.bounds or now is not None else ("mean",)
        limit = limits.get(name) or _told_limit(line, name)
        rows.append(
            Row(
                name=name,
                unit=scale.units.get(name, ""),
                state=state,
                notes=notes,
                bounds=_bounds(scale, name, shown),
                usual=known.tolist() if known is not None else None,
                shown=shown,
                curves=[
                    _curve(line, name, _sum(statistic), 0, dashed=statistic == "spread") for statistic in statistics
                ],
                limit=limit,
                spells=[Spell("insufficient", *spell) for spell in line.spells(name, "insufficient")]
                + _spells(line, name),
            )
        )
    return rows, [one for one in [_estimate(line, 0)] if one is not None]


def of_many(
    lines: Mapping[str, Timeline],
    scale: Scale,
    fleet: Mapping[str, Ints],
    shown: Mapping[str, Mapping[str, Ints]],
    told: Callable[[str], tuple[str, list[str]]],
) -> tuple[list[Row], list[Estimate]]:
    """Rows and estimates of several devices in one picture; `told` gives a field's state and notes."""
    rows = []
    for name, usual in fleet.items():
        state, notes = told(name)
        parts = [(i, shown[d][name].tolist()) for i, d in enumerate(lines) if name in shown.get(d, {})]
        rows.append(
            Row(
                name=name,
                unit=scale.units.get(name, ""),
                state=state,
                notes=notes,
                bounds=_bounds(scale, name, [(0, usual.tolist())]),
                usual=usual.tolist(),
                shown=parts,
                curves=[_curve(line, name, _larger, i) for i, line in enumerate(lines.values())],
                limit=max((x for line in lines.values() if (x := _told_limit(line, name)) is not None), default=None),
                spells=[spell for i, line in enumerate(lines.values()) for spell in _spells(line, name, i)],
            )
        )
    return rows, [one for i, line in enumerate(lines.values()) if (one := _estimate(line, i)) is not None]


def _subjects(line: Timeline) -> list[str]:
    fields = list(line.shapes)
    known = {name for point in line.points for name in point.subjects}
    fields += sorted(known - set(fields) - set(_OTHERS))
    # The answers have no sum to draw: they are worth a row where they drifted.
    others = [n for n in _OTHERS if n in known and (n != "output" or any(line.spells(n, "drift")))]
    return fields + others


def _state(line: Timeline, name: str) -> str:
    return next((p.subjects[name].state for p in reversed(line.points) if name in p.subjects), "insufficient")


def _bounds(scale: Scale, name: str, shown: Sequence[tuple[int, Sequence[int]]]) -> Sequence[float] | None:
    bounds = scale.bounds.get(name)
    return bounds if bounds is not None and all(len(counts) == len(bounds) + 1 for _, counts in shown) else None


def _curve(line: Timeline, name: str, value: Callable[[Subject], float], series: int, *, dashed: bool = False) -> Curve:
    told = [(p.t[1], p.subjects.get(name)) for p in line.points]
    # While it is learned there is nothing to sum.
    values = [None if s is None or s.state == "insufficient" else value(s) for _, s in told]
    return Curve(series, [t for t, _ in told], values, dashed)


def _sum(statistic: str) -> Callable[[Subject], float]:
    return lambda subject: float(getattr(subject, statistic))


def _larger(subject: Subject) -> float:
    return max(subject.mean, subject.spread)


def _spells(line: Timeline, name: str, series: int = 0) -> list[Spell]:
    return [Spell(s, *spell, series) for s in ("drift", "fault") for spell in line.spells(name, s)]


def _told_limit(line: Timeline, name: str) -> float | None:
    """As the messages say it."""
    found = (p.subjects[name].limit for p in reversed(line.points) if name in p.subjects)
    return next((limit for limit in found if limit is not None), None)


def _estimate(line: Timeline, series: int) -> Estimate | None:
    if all(point.accuracy is None for point in line.points):
        return None
    told: list[Any] = [point.accuracy or (None, None, None) for point in line.points]
    return Estimate(series, [p.t[1] for p in line.points], *zip(*told, strict=True))
