"""Drift plot: complete, in bounds, and safe for any name or sentence."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from outstation.foundation.cli import plot_file
from outstation.foundation.errors import UsageError
from outstation.foundation.render import axes, drift_panels
from outstation.foundation.render.drift_model import (
    DriftPlot,
    EvidenceCurve,
    PerformanceEstimate,
    PlotRow,
    StateInterval,
)
from outstation.foundation.render.drift_plot import render_drift
from outstation.foundation.render.theme import DARK_THEME, LIGHT_THEME

SVG = "{http://www.w3.org/2000/svg}"
MINUTE = 60_000_000
BEGIN = 1_795_000_000_000_000
TIMES = [BEGIN + i * MINUTE for i in range(20)]
BOUNDS = [i / 4 for i in range(33)]
COUNTS = [0, *range(16), *reversed(range(16)), 0]


def row(name: str = "ax", *intervals: StateInterval, **changes: object) -> PlotRow:
    default = PlotRow(
        name=name,
        unit="g",
        state="drift",
        notes=["JS 0.10"],
        bounds=BOUNDS,
        reference=COUNTS,
        histograms=[(0, COUNTS[::-1])],
        curves=[
            EvidenceCurve(0, TIMES, [float(i) for i in range(20)]),
            EvidenceCurve(0, TIMES, [None, *[1.0] * 19], dashed=True),
        ],
        limit=5.0,
        intervals=intervals,
    )
    return replace(default, **changes)


def plot(*rows: PlotRow, **changes: object) -> DriftPlot:
    estimate = PerformanceEstimate(0, TIMES, [0.9] * 20, [0.8] * 20, [1.0] * 20)
    default = DriftPlot(
        "Drift of exercise at pi-01", "20 windows", [], ["mean"], "spread", "reference", rows, [estimate]
    )
    return replace(default, **changes)


def classes(svg: str) -> list[str]:
    return [element.get("class", "") for element in ET.fromstring(svg).iter()]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("fields", [1, 2, 6, 16, 40])
def test_every_field_has_a_row_within_the_plot(fields: int) -> None:
    svg = render_drift(plot(*(row(f"field {i}") for i in range(fields))))
    root = ET.fromstring(svg)
    assert [f"field {i} (g)" for i in range(fields)] == [t for t in texts(svg) if t.startswith("field ")]
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    for element in root.iter():
        for name, limit in (("x", width), ("x1", width), ("x2", width), ("y", height), ("y1", height), ("y2", height)):
            assert 0 <= float(element.get(name, 0)) <= limit
        for point in element.get("d", "").strip("MZ").split("L"):
            if point:
                x, y = map(float, point.split())
                assert 0 <= x <= width
                assert 0 <= y <= height


def test_rows_do_not_overlap() -> None:
    root = ET.fromstring(render_drift(plot(*(row(f"f{i}") for i in range(16)))))
    bars = [e for e in root.iter(f"{SVG}rect") if e.get("class") == "state-drift"]
    spans = [(float(e.attrib["y"]), float(e.attrib["y"]) + float(e.attrib["height"])) for e in bars]
    assert all(before[1] + 17 <= after[0] for before, after in pairwise(spans))


def test_alerts_are_marked_and_faults_are_shaded() -> None:
    closed = StateInterval("drift", TIMES[4], TIMES[8], ongoing=False)
    ongoing = StateInterval("fault", TIMES[12], TIMES[19], ongoing=True)
    names = classes(render_drift(plot(row("ax", closed, ongoing))))
    counted = {name: names.count(name) for name in ("raised", "cleared", "band-drift", "band-fault", "limit")}
    assert counted == {"raised": 2, "cleared": 1, "band-drift": 1, "band-fault": 1, "limit": 1}


def test_without_a_limit_there_is_no_alarm_line() -> None:
    svg = render_drift(plot(row(limit=None)))
    assert "limit" not in classes(svg)
    assert "alarm" not in texts(svg)


def test_evidence_far_above_the_limit_is_cut_off_and_labelled() -> None:
    svg = render_drift(plot(row(curves=[EvidenceCurve(0, TIMES, [100.0 * i for i in range(20)])])))
    assert "up to 1.9e3" in texts(svg)


def test_an_empty_plot_shows_its_message() -> None:
    svg = render_drift(plot(estimates=[], empty_message="No drift window yet."))
    assert [t for t in texts(svg) if t == "No drift window yet."]
    assert "field" not in classes(svg)


def test_a_single_window_is_drawn_as_a_point() -> None:
    svg = render_drift(plot(row(curves=[EvidenceCurve(0, TIMES[:1], [2.0])]), estimates=[]))
    assert any(e.get("class") == "curve" for e in ET.fromstring(svg).iter(f"{SVG}circle"))


def test_the_dark_plot_has_equal_content() -> None:
    light, dark = render_drift(plot(row())), render_drift(plot(row()), dark=True)
    assert (LIGHT_THEME.paper in light, DARK_THEME.paper in dark, LIGHT_THEME.paper in dark) == (True, True, False)
    assert texts(light) == texts(dark)


@given(st.text(max_size=300), st.text(max_size=300))
def test_no_name_or_sentence_becomes_markup(name: str, sentence: str) -> None:
    svg = render_drift(plot(row(name), alerts=[("drift", sentence)], series_names=[name], title=sentence))
    plain = render_drift(plot(row("a"), alerts=[("drift", "a")], series_names=["a"], title="a"))
    kinds = [element.tag for element in ET.fromstring(svg).iter() if element.tag != f"{SVG}text"]
    assert kinds == [element.tag for element in ET.fromstring(plain).iter() if element.tag != f"{SVG}text"]


def test_equal_content_gives_equal_bytes() -> None:
    assert render_drift(plot(row())) == render_drift(plot(row()))


def test_a_png_has_twice_the_size() -> None:
    pytest.importorskip("resvg_py")
    svg = render_drift(plot(row()))
    data = plot_file.to_png(svg)
    root = ET.fromstring(svg)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == tuple(round(2 * float(root.attrib[n])) for n in ("width", "height"))


def test_without_a_font_a_png_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(plot_file, "_FONT_FOLDERS", (str(tmp_path),))
    with pytest.raises(UsageError, match=r"needs a font: .*; or name a file that ends in \.svg"):
        plot_file.to_png(render_drift(plot(row())))


# --- histograms and axes ---

counts = st.lists(st.integers(0, 1000), min_size=34, max_size=34)


@given(counts, st.lists(st.floats(0.001, 100), min_size=32, max_size=32))
def test_rebinning_keeps_every_row_within_the_bounds(source: list[int], widths: list[float]) -> None:
    bounds = [0.0]
    for width in widths:
        bounds.append(bounds[-1] + width)
    inner = sum(source[1:-1])
    outline = drift_panels.rebin(bounds, source, bounds[0], bounds[-1])
    assert sum(outline) * sum(source) == pytest.approx(inner, abs=1e-6 * (1 + inner))
    assert min(outline) >= -1e-12
    low, high = drift_panels.visible_range(bounds, [source])
    assert low < high


def test_a_broad_quantile_bin_is_drawn_low() -> None:
    bounds = [0.0, *[i / 310 for i in range(1, 32)], 1.0]
    outline = drift_panels.rebin(bounds, [0, *[10] * 32, 0], 0.0, 1.0)
    assert outline[0] > 5 * outline[-1] > 0


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(1, 8))
def test_ticks_are_few_and_within(low: float, width: float, about: int) -> None:
    high = low + width
    ticks = axes.linear_ticks(low, high, about)
    assert len(ticks) <= 2 * about + 2
    slack = 1e-6 * (abs(low) + abs(high) + width)
    assert all(low - slack <= tick <= high + slack for tick in ticks)


@pytest.mark.parametrize("seconds", [1, 90, 3600, 86_400, 30 * 86_400, 10 * 365 * 86_400, 100 * 365 * 86_400])
def test_time_ticks_are_few_and_within(seconds: int) -> None:
    ticks = axes.time_ticks(BEGIN, BEGIN + seconds * 1_000_000, 8)
    assert 1 <= len(ticks) <= 9
    assert all(BEGIN <= t <= BEGIN + seconds * 1_000_000 for t, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)
