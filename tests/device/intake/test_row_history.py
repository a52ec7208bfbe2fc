"""Row history: rows that repeat, come late or jump are rejected, across connections, transactions and restarts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake import row_history
from outstation.device.intake.row_history import (
    LatestTime,
    RecentRows,
    RowHistory,
    ScreenedRows,
    hash_rows,
    recent_rows,
    screen,
)
from outstation.device.store.quota import PAGE_SIZE
from outstation.device.store.rows import RawColumns, Rows, validate_columns
from outstation.foundation.clock import ClockReading
from outstation.foundation.config.quantities import Duration
from tests.kit.stations import T0, Station, conf

PAIR = StreamConfig(fields=[FieldConfig(name="a"), FieldConfig(name="b", optional=True)])
STEPPED = StreamConfig(fields=[FieldConfig(name="a", max_step=1.0), FieldConfig(name="b", optional=True, max_step=5.0)])
NOW = ClockReading(round((T0 + 10_000) * 1e6), 100.0, "synced")


def rows(t: list[float], a: list[float], b: list[float | None] | None = None) -> Rows:
    values = {"a": a, "b": b or [0.0] * len(t)}
    return validate_columns(RawColumns(len(t), [T0 + s for s in t], values), PAIR, 0, None).rows


def screened_rows(
    history: RowHistory,
    new: Rows,
    stream: StreamConfig = PAIR,
    now: ClockReading = NOW,
    *,
    has_time: Any = True,
    stored: Sequence[Rows] = (),
    is_recording: bool = False,
) -> ScreenedRows:
    history = history.begin_transaction()
    return screen(history, new, has_time, stream, now, lambda _: list(stored), is_recording=is_recording)


def rejected(history: RowHistory, new: Rows, *arguments: Any, **options: Any) -> tuple[dict[int, str], RowHistory]:
    screened = screened_rows(history, new, *arguments, **options)
    return {index: kind for index, (kind, _) in screened.rejected.items()}, screened.history


QUALITIES: list[Literal["synced", "unsynced"]] = ["synced", "unsynced"]
TIMES = st.lists(st.integers(0, 400), min_size=1, max_size=4).map(sorted)


@given(st.lists(st.tuples(TIMES, st.booleans(), st.sampled_from([-300, 0, 20_000])), min_size=1, max_size=8), st.data())
def test_the_short_way_of_rows_after_all_others_decides_as_the_long_way(
    blocks: list[tuple[list[int], bool, int]], data: st.DataObject
) -> None:
    """A mask of times takes the long way, True the short one where it may."""
    is_named, quality = data.draw(st.booleans()), data.draw(st.sampled_from(QUALITIES))
    stream = data.draw(st.sampled_from([PAIR, StreamConfig(fields=PAIR.fields, duplicates="accept")]))
    short, long = RowHistory(), RowHistory()
    latest = LatestTime() if is_named else None
    stored: list[Rows] = []
    for times, is_recording, ahead in blocks:
        new = rows([20.0 * len(stored) + t for t in times], [1.0] * len(times))
        now = ClockReading(NOW.wall_us - 10_000_000_000 + ahead * 1_000_000, 100.0, quality)
        results = []
        for history, has_time in ((short, True), (long, np.ones(len(times), bool))):
            results.append(
                screen(
                    *(history.begin_transaction(), new, has_time, stream, now, lambda _: list(stored)),
                    is_recording=is_recording,
                    producer_latest=latest,
                )
            )
        shortly, at_length = results
        assert (shortly.rejected, shortly.out_of_order, shortly.latest) == (
            at_length.rejected,
            at_length.out_of_order,
            at_length.latest,
        )
        recent = [r.history.recent and (r.history.recent.t.tolist(), r.history.recent.hashes.tolist()) for r in results]
        assert recent[0] == recent[1]
        without = [replace(result.history, recent=None) for result in results]
        assert without[0] == without[1]
        short, long = shortly.history, at_length.history
        latest = shortly.latest if is_named else None
        accepted = np.setdiff1d(np.arange(len(times)), list(shortly.rejected))
        stored.append(Rows(new.t[accepted], tuple(column[accepted] for column in new.columns)))


# --- duplicates


def test_a_row_with_the_time_and_values_of_an_earlier_one_is_a_duplicate() -> None:
    results, history = rejected(RowHistory(), rows([0, 1, 1, 1, 2], [1, 2, 2, 3, 4]))
    assert results == {2: "duplicate"}
    results, history = rejected(history, rows([1, 1, 2, 3], [3, 5, 4, 4]))
    assert results == {0: "duplicate", 2: "duplicate"}
    assert rejected(history, rows([1, 3], [5, 4]))[0] == {0: "duplicate", 1: "duplicate"}


def test_missing_values_and_signs_of_zero_are_compared_bit_by_bit() -> None:
    _, history = rejected(RowHistory(), rows([0, 0], [0.0, -0.0], [None, 1]))
    assert rejected(history, rows([0, 0, 0], [0.0, -0.0, 0.0], [None, 1, 0]))[0] == {0: "duplicate", 1: "duplicate"}


def test_rows_without_a_time_of_their_own_are_never_duplicates() -> None:
    _, history = rejected(RowHistory(), rows([0, 0], [1, 1]), has_time=False)
    mask = np.array([False, True, True])
    assert rejected(history, rows([0, 0, 0], [1, 1, 1]), has_time=mask)[0] == {2: "duplicate"}


def test_rejected_rows_are_not_compared_with() -> None:
    _, history = rejected(RowHistory(), rows([0, 0, 1], [1, 1, 50]), STEPPED)
    assert rejected(history, rows([1], [50]), STEPPED)[0] == {}


def test_the_rows_that_are_compared_are_limited_in_count_and_bytes() -> None:
    many_fields = StreamConfig(fields=[FieldConfig(name=f"f{i}", type="f64") for i in range(6_000)])
    assert recent_rows(PAIR) == row_history.MAX_RECENT_ROWS
    assert recent_rows(many_fields) < 400
    history = RowHistory()
    for block in range(3):
        t = [block + i / 1e5 for i in range(40_000)]
        _, history = rejected(history, rows([*t, t[-1]], [1.0] * 40_001))
    assert history.recent is not None
    assert len(history.recent.hashes) == row_history.MAX_RECENT_ROWS


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=12), st.integers(1, 8), st.data())
def test_recent_rows_never_change_when_rows_are_appended(
    blocks: list[list[int]], limit: int, data: st.DataObject
) -> None:
    every: list[tuple[RecentRows, list[int]]] = [(RecentRows.from_rows([], limit), [])]
    for times in blocks:
        # A transaction that failed leaves rows behind an earlier state.
        before, expected = data.draw(st.sampled_from(every))
        t = np.array(times, np.int64)
        every.append((before.append(t, t.view(np.uint64), limit), [*expected, *times][-limit:]))
        first, last = sorted(data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9))))
        for recent, stored in every:
            assert (recent.t.tolist(), recent.hashes.tolist()) == (stored, stored)
            sought = np.arange(first, last + 1, dtype=np.uint64)
            assert recent.find(sought, first, last).tolist() == [int(value) in stored for value in sought]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=40), st.data())
def test_each_row_is_accepted_once_however_it_is_split(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    accepted: list[tuple[int, int]] = []
    history, at = RowHistory(), 0
    pairs = sorted(pairs, key=lambda pair: pair[0])
    while at < len(pairs):
        size = data.draw(st.integers(1, len(pairs) - at))
        part = pairs[at : at + size]
        stored = [rows([t for t, _ in accepted], [a for _, a in accepted])] if accepted else []
        results, history = rejected(history, rows([t for t, _ in part], [a for _, a in part]), stored=stored)
        accepted += [pair for index, pair in enumerate(part) if index not in results]
        at += size
    assert sorted(accepted) == sorted(set(pairs))
    assert len(set(hash_rows(rows([t for t, _ in accepted], [a for _, a in accepted])).tolist())) == len(accepted)


# --- lateness


def test_a_row_that_is_older_than_the_allowed_lateness_is_late_and_others_are_counted() -> None:
    _, history = rejected(RowHistory(), rows([100], [1]))
    screened = screen(
        history.begin_transaction(), rows([30, 45, 99, 101], [1] * 4), True, PAIR, NOW, lambda _: [], is_recording=False
    )
    assert screened.rejected == {0: ("late", "")}
    assert screened.out_of_order == 2
    assert screened.history.latest_us == round((T0 + 101) * 1e6)


def test_recordings_may_be_older_and_are_counted() -> None:
    _, history = rejected(RowHistory(), rows([1000], [1]))
    screened = screen(
        history.begin_transaction(), rows([0, 1], [1, 1]), True, PAIR, NOW, lambda _: [], is_recording=True
    )
    assert (screened.rejected, screened.out_of_order) == ({}, 2)


def test_a_clock_that_was_in_the_future_keeps_out_nothing_once_it_is_right() -> None:
    now = ClockReading(round(T0 * 1e6), 1.0, "synced")
    _, history = rejected(RowHistory(), rows([86_400 * 365], [1]), now=now)
    results, history = rejected(history, rows([0, 1], [1, 2]), now=now)
    assert results == {}
    assert history.latest_us == round((T0 + 1) * 1e6)
    assert rejected(history, rows([-61], [1]), now=now)[0] == {0: "late"}
    # An unsynced clock is no witness.
    unsynced = ClockReading(0, 1.0, "unsynced")
    assert rejected(history, rows([-61], [1]), now=unsynced)[0] == {0: "late"}


def test_one_row_in_the_future_of_an_unsynced_clock_costs_two_rows() -> None:
    unsynced = ClockReading(0, 1.0, "unsynced")
    _, future = rejected(RowHistory(), rows([86_400 * 365], [1]), now=unsynced)
    assert rejected(future, rows([0, 1, 2, 3], [1] * 4), now=unsynced)[0] == {0: "late", 1: "late"}
    history = future
    for n in range(5):
        results, history = rejected(history, rows([n], [1]), now=unsynced)
        assert results == ({0: "late"} if n < 2 else {})
    # After a restart the same: only the latest time lasts.
    restarted = RowHistory(history.latest_us)
    assert rejected(restarted, rows([5], [1]), now=unsynced)[0] == {}


def test_late_rows_between_others_on_an_unsynced_clock_stay_late() -> None:
    unsynced = ClockReading(0, 1.0, "unsynced")
    _, history = rejected(RowHistory(), rows([1000], [1]), now=unsynced)
    for n in range(4):
        results, history = rejected(history, rows([n, 1000 + n], [1, 2]), now=unsynced)
        assert results == {0: "late"}


def test_a_row_ahead_of_the_clock_that_is_sent_again_is_a_duplicate() -> None:
    now = ClockReading(round(T0 * 1e6), 1.0, "synced")
    ahead, other = rows([1], [1]), rows([0], [2])
    _, history = rejected(RowHistory(), ahead, now=now)
    _, history = rejected(history, other, now=now, stored=[ahead])
    assert rejected(history, ahead, now=now, stored=[ahead, other])[0] == {0: "duplicate"}
    # After a restart, its time is read from the stored rows.
    restarted = RowHistory(history.latest_us)
    assert rejected(restarted, ahead, now=now, stored=[ahead, other])[0] == {0: "duplicate"}


def test_a_declared_lateness_is_allowed() -> None:
    patient = StreamConfig(fields=PAIR.fields, allowed_lateness=Duration(3600.0))
    _, history = rejected(RowHistory(), rows([3700], [1]))
    assert rejected(history, rows([99, 101], [1, 1]), patient)[0] == {0: "late"}


# --- steps


@pytest.mark.parametrize(
    ("values", "jumps"),
    [
        ([1, 2, 3, 4], []),
        ([1, 1, 9, 1, 1], [2]),
        ([1, 9, 9.5, 10], [1]),
        ([1, 9, 20, 1], [1, 2]),
        ([1, 9, 1, 5, 1], [1, 3]),
        ([0.1, 1.1, 2.1], []),
        ([5], []),
    ],
)
@pytest.mark.parametrize("split", [False, True])
def test_a_spike_costs_one_row_and_a_new_level_is_accepted_from_its_second(
    values: list[float], jumps: list[int], split: bool
) -> None:
    results: dict[int, str] = {}
    history = RowHistory()
    for first in range(len(values)) if split else [0]:
        part = values[first : first + 1] if split else values
        now, history = rejected(history, rows([first + i for i in range(len(part))], part), STEPPED)
        results |= {first + index: kind for index, kind in now.items()}
    assert results == dict.fromkeys(jumps, "step")


def test_missing_values_are_no_step() -> None:
    results, _ = rejected(RowHistory(), rows([0, 1, 2, 3], [1, 1, 1, 1], [1, None, 3, 30]), STEPPED)
    assert results == {3: "step"}


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=40), st.integers(1, 40))
def test_steps_are_the_same_however_rows_are_split(values: list[int], size: int) -> None:
    def run(size: int) -> dict[int, str]:
        results: dict[int, str] = {}
        history = RowHistory()
        for first in range(0, len(values), size):
            part = [float(v) for v in values[first : first + size]]
            now, history = rejected(history, rows([first + i for i in range(len(part))], part), STEPPED)
            results |= {first + index: kind for index, kind in now.items()}
        return results

    assert run(size) == run(len(values))
    level, before = float(values[0]), float(values[0])
    expected = []
    for index, value in enumerate(values):
        if abs(value - level) > 1 and abs(value - before) > 1:
            expected.append(index)
        else:
            level = value
        before = value
    assert sorted(run(len(values))) == expected


# --- in the running intake


@pytest.fixture
def declared(tmp_path: Path) -> Callable[..., Station]:
    fields = [FieldConfig(name="a", max_step=10.0), FieldConfig(name="kind", type="category")]

    def start(**stream: Any) -> Station:
        return Station(conf(tmp_path, pair=StreamConfig(fields=fields, **stream)))

    return start


def row(t: float, a: float, kind: str = "x") -> dict[str, Any]:
    return {"stream": "pair", "t": T0 + t, "a": a, "kind": kind}


def test_rejections_have_reasons_and_counts_and_last_across_connections_and_restarts(
    declared: Callable[..., Station],
) -> None:
    with declared() as station:
        with station.line() as line:
            line.send(*(row(n, 1) for n in range(100)))
            assert line.through(100)["accepted"] == 100
        with station.line() as line:
            line.send(row(99, 1), row(99, 1, "y"), row(99, 50, "y"), row(30, 1, "z"), row(98.5, 1))
            total = line.through(5)
        assert total["accepted"] == 1
        assert [item["line"] for item in total["rejected"]] == [1, 3, 4, 5]
        reasons = {item["line"]: item["reason"] for item in total["rejected"]}
        assert reasons[1].startswith("duplicate: a row with this time and these values is in the stream already")
        assert reasons[3] == "a changed by more than max_step 10 since the row before"
    with declared() as station, station.line() as line:
        columns = {"t": [T0 + 97, T0 + 99, T0 + 99.5], "a": [1, 1, 100], "kind": ["x", "y", "y"]}
        line.send({"stream": "pair", "columns": columns})
        [reason] = [item["reason"] for item in line.through(1)["rejected"]]
        assert "row 1 of the columns: duplicate: " in reason
        assert "row 2 of the columns: duplicate: " in reason
        assert "row 3 of the columns: a changed by more than max_step 10" in reason
        line.close()
        with station.line() as other:
            other.send(row(38, 1))
            assert other.answer()["rejected"][0]["reason"].startswith("late: t is more than 60 s before")
        counters = station.store.counters()
        assert counters["rows duplicate.pair"] == 3
        assert counters["rows late.pair"] == 1


def test_the_backlogs_of_two_named_producers_lose_nothing(declared: Callable[..., Station]) -> None:
    for first in (0, 120):
        # The daemon is down in between.
        with declared() as station:
            for name in ("a", "b"):
                with station.line() as line:
                    line.send({"client": name})
                    assert line.answer()["through"] == first
                    line.send(*(row(first + n, 1, name) for n in range(120)))
                    answer = line.through(first + 120)
                    assert (answer["accepted"], answer["rejected"]) == (120, [])
            assert station.store.last_row("pair") == 2 * (first + 120)
            assert "rows late.pair" not in station.store.counters()


@pytest.mark.parametrize("restarts", [False, True])
def test_a_named_producer_is_late_by_its_own_rows(declared: Callable[..., Station], restarts: bool) -> None:
    answers = []
    with contextlib.ExitStack() as running:
        station = running.enter_context(declared())
        for lines, t in enumerate((100, 30)):
            if restarts and lines:
                running.close()
                station = running.enter_context(declared())
            with station.line() as line:
                line.send({"client": "a"})
                line.answer()
                line.send(row(t, 1))
                answers.append(line.through(lines + 1))
    assert answers[0]["rejected"] == []
    assert answers[1]["rejected"][0]["reason"].startswith("late: ")


def test_sensors_beyond_max_categories_are_no_duplicates_of_each_other(tmp_path: Path) -> None:
    fields = [FieldConfig(name="a"), FieldConfig(name="kind", type="category", max_categories=3)]
    with Station(conf(tmp_path, pair=StreamConfig(fields=fields))) as station, station.line() as line:
        line.send(*(row(0, 1, f"s{n}") for n in range(6)), row(0, 1, "s0"))
        total = line.through(7)
        assert (total["accepted"], [item["line"] for item in total["rejected"]]) == (6, [7])


def test_a_stream_with_duplicates_accepted_stores_equal_rows(declared: Callable[..., Station]) -> None:
    with declared(duplicates="accept") as station:
        for _ in range(2):
            with station.line() as line:
                line.send(row(1, 1), row(1, 1))
                assert line.through(2)["accepted"] == 2


def test_rows_that_a_full_store_refused_are_no_duplicates_when_they_come_again(tmp_path: Path) -> None:
    with Station(conf(tmp_path), max_size=256 * PAGE_SIZE) as station, station.line() as line:
        n, first = 4000, 0
        while True:
            columns = {"t": [T0 + first + i / n for i in range(n)], "ax": [1] * n, "ay": [1] * n}
            line.send({"stream": "watch", "columns": columns})
            answer = line.answer()
            if answer["rejected"]:
                break
            first += 1
        assert "not stored" in answer["rejected"][0]["reason"]
        line.send({"stream": "watch", "columns": columns})
        assert "not stored" in line.answer()["rejected"][0]["reason"]
        assert not any(name.startswith("rows ") for name in station.store.counters())


def test_two_producers_with_interleaved_rows_of_one_stream_lose_nothing(declared: Callable[..., Station]) -> None:
    with declared() as station, station.line() as first, station.line() as second:
        for n in range(0, 40, 4):
            first.send(*(row(n + i / 10, 1) for i in range(20)))
            second.send(*(row(n + 1 + i / 10, 2) for i in range(20)))
        assert first.through(200)["accepted"] == 200
        assert second.through(200)["accepted"] == 200
