"""Order of recordings in a replay: their own times, scenes, and row numbers."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.device import config
from outstation.device.config.sources import RecordingFilter, ReplaySource
from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake.sources.recordings import Playlist
from outstation.device.intake.sources.replay import ReplayPlayer
from outstation.foundation.errors import ConfigError, UsageError
from outstation.ml.datasets.recordings import Recordings, load
from outstation.ml.model.sandbox import available_memory
from outstation.workbench.testing.patience import wait_until
from tests.device.intake.test_sources import start
from tests.kit.stations import Station, conf

DAY, WEEK = 86_400, 7 * 86_400
MAY = 1_367_391_600.0


def timed(n: int = 200, step_s: float = 900.0) -> Recordings:
    """Rows that count themselves, a quarter of an hour apart, with a gap of a day in the middle."""
    t = MAY + np.arange(n) * step_s + (np.arange(n) >= n // 2) * DAY
    rows = np.arange(n, dtype=np.float32)[:, None]
    return make_recordings(rows, [0, n], t=t, rate=(n - 1) / float(t[-1] - t[0]))


def make_recordings(rows: Any, starts: list[int], **members: Any) -> Recordings:
    zeros = np.zeros(len(starts) - 1, np.int64)
    members = {"rate": 100.0, "label": zeros, "subject": zeros, **members}
    return Recordings(rows=rows, starts=np.array(starts), labels=[], fields=["n"], **members)


def scenes(*turns: tuple[str, int]) -> list[RecordingFilter]:
    return [RecordingFilter(column="fault", value=value, from_row=row) for value, row in turns]


def several(lengths: list[int], faults: list[str]) -> Recordings:
    starts = [0, *np.cumsum(lengths).tolist()]
    rows = np.arange(starts[-1], dtype=np.float32)[:, None]
    return make_recordings(rows, starts, columns={"fault": np.array(faults)})


def saved(path: Path, recordings: Recordings) -> Path:
    assert recordings.t is not None
    np.savez(path, rows=recordings.rows, fields=np.array(["n"]), t=recordings.t, power=recordings.rows[:, 0] * 2)
    return path


def test_rows_of_a_file_with_times_keep_them_in_the_store(tmp_path: Path) -> None:
    known, stream = timed(), StreamConfig(fields=[FieldConfig(name="n")])
    file = saved(tmp_path / "r.npz", known)
    source = ReplaySource(file=str(file), speed=1e7, rows=150, skip=20)
    made = conf(tmp_path / "data", weather=stream)
    with Station(made, sources=lambda s: [ReplayPlayer("weather", stream, source, s, start())]) as station:
        wait_until("150 rows", lambda: station.store.last_row("weather") == 150)
        rows = station.rows("weather")
    assert known.t is not None
    assert rows.columns[0].tolist() == list(range(20, 170))
    assert (rows.t / 1e6).tolist() == known.t[20:170].tolist()


@pytest.mark.attack("files")
@pytest.mark.parametrize(
    ("dtype", "n", "peak_mib"), [(np.float64, 10 << 20, 4), (np.int8, 20 << 20, 64)], ids=["deflated", "widened"]
)
def test_a_zip_bomb_of_recordings_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type[np.generic], n: int, peak_mib: int
) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, rows=np.zeros((n, 1), dtype), fields=np.array(["n"]))
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(available_memory, "available_bytes", lambda: 64 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(
            UsageError, match=r"bomb\.npz: not readable as recordings: its arrays take 80 MiB .* 64 MiB"
        ):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < peak_mib << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("n", "step_s", "period_s"),
    [(700, 900.0, 2 * WEEK), (200, 900.0, 4 * DAY)],
    ids=["8 days", "3 days"],
)
def test_the_next_pass_keeps_the_time_of_day_and_of_weeks_the_day(n: int, step_s: float, period_s: float) -> None:
    known = timed(n, step_s)
    parts = Playlist(known, None, 7).iter_items()
    first, second, third = (next(parts) for _ in range(3))
    assert known.t is not None
    assert (first.offset_s, second.offset_s, third.offset_s) == (0.0, period_s, 2 * period_s)
    assert known.t[-1] < known.t[0] + second.offset_s
    assert (first.n, second.first, second.start) == (n, n + 1, 0)


def test_a_recording_of_less_than_a_day_goes_on_without_a_gap() -> None:
    t = MAY + np.array([0.0, 2.0, 4.0, 9.0, 11.0])
    parts = Playlist(make_recordings(np.zeros((5, 1), np.float32), [0, 5], t=t), None, 7).iter_items()
    assert [next(parts).offset_s for _ in range(3)] == [0.0, 13.0, 26.0]


def test_rows_that_are_skipped_are_there_in_the_next_pass() -> None:
    parts = Playlist(timed(), None, 0, skip=150).iter_items()
    first, second = next(parts), next(parts)
    assert (first.start, first.n) == (150, 50)
    assert (second.first, second.start, second.n) == (51, 0, 200)


def test_a_pace_is_that_of_the_times_on_average(tmp_path: Path) -> None:
    known = load(saved(tmp_path / "r.npz", timed()))
    assert known.rate == pytest.approx(199 / (199 * 900 + DAY))
    assert known.columns["power"].tolist() == (np.arange(200) * 2).tolist()


def test_a_scene_begins_exactly_at_its_row() -> None:
    known = several([100, 120, 140], ["none", "none", "bearing"])
    order = Playlist(known, None, 3, scenes(("none", 1), ("bearing", 501), ("none", 701)))
    of_row = np.searchsorted(known.starts, order.source_rows(1000), side="right") - 1
    faults = known.columns["fault"][of_row]
    assert set(faults[:500]) == set(faults[700:]) == {"none"}
    assert set(faults[500:700]) == {"bearing"}


@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=6),
    st.integers(0, 5),
    st.lists(st.integers(2, 200), unique=True, max_size=3),
    st.integers(0, 250),
)
def test_parts_follow_each_other_without_a_gap_and_go_on_after_any_row(
    lengths: list[int], seed: int, turns: list[int], after: int
) -> None:
    known = several(lengths, [("none", "bearing")[i % 2] for i in range(len(lengths))])
    turned = [(("bearing", "none")[i % 2], row) for i, row in enumerate(sorted(turns))]
    order = Playlist(known, None, seed, scenes(("none", 1), *turned))
    places = order.source_rows(300)
    parts = order.iter_items(after)
    row = None
    for part in parts:
        assert row is None or part.first == row
        assert part.n > 0
        row = part.last + 1
        if part.first > 300:
            break
        shown = places[part.first - 1 : part.last]
        assert len(shown)
        assert shown.tolist() == list(range(part.start, part.start + part.n))[: len(shown)]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"scenes": scenes(("none", 1))}, "scenes are for recordings without times"),
        ({"skip": 200}, "the recordings have 200 rows"),
    ],
)
def test_options_that_recordings_with_times_exclude_are_refused(wrong: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Playlist(timed(), None, 0, **wrong)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"scenes": [RecordingFilter(column="colour", value="red")]}, "no column 'colour'"),
        ({"scenes": scenes(("loose", 1))}, "no recording has fault = 'loose'"),
        ({"skip": 1}, "no times"),
    ],
)
def test_a_scene_that_no_recording_shows_is_named(wrong: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Playlist(several([10, 10], ["none", "bearing"]), None, 0, **wrong)


def test_times_that_run_backwards_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", rows=np.zeros((3, 1)), fields=np.array(["n"]), t=np.array([1.0, 3.0, 2.0]))
    with pytest.raises(UsageError, match="t must ascend, a time for each of 3 rows"):
        Playlist(load(tmp_path / "r.npz"), None, 0)


def test_scenes_out_of_order_are_an_error_of_the_config(tmp_path: Path) -> None:
    file = tmp_path / "outstation.toml"
    file.write_text(
        '[device]\nid = "pi-1"\nfleet = "a"\ndata_dir = "d"\n[streams.s]\nfields = [{ name = "n" }]\n'
        'source = { kind = "replay", file = "r.npz", scenes = [{ column = "fault", value = "none", from_row = 9 }] }\n'
    )
    with pytest.raises(ConfigError, match=r"streams\.s\.source\.scenes: from_row must be 1 for the first"):
        config.load(file)
