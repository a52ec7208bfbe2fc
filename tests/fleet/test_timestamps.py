"""Timestamp reconstruction: for any clock of a device, the true time lies within the collector's bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from outstation.fleet.audit.audit import audit
from outstation.fleet.database.store import FleetStore
from outstation.foundation.errors import MessageRefused
from outstation.protocol.wire.messages import AuditPayload, ResultsPayload
from outstation.protocol.wire.verification import VerifiedMessage
from outstation.workbench.testing.messages import MessageSender
from tests.kit.clocks import TRUE_START_US, Dated, Machine, Station, collect, dated

S = 1_000_000
HOUR, DAY = 3600 * S, 86_400 * S
STEPS = [-3600 * S, 3600 * S, 60 * DAY, 730 * DAY, -700 * DAY, 2 * S, -400_000, -TRUE_START_US]

Event = tuple[str, float]
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("run"), st.floats(0.5, 40_000)),
        st.tuples(st.just("rows"), st.floats(1, 5)),
        st.tuples(st.just("step"), st.sampled_from(STEPS).map(float)),
        st.tuples(st.just("step before the commit"), st.sampled_from(STEPS).map(float)),
        st.tuples(st.just("sync"), st.floats(-200_000, 200_000)),
        st.tuples(st.just("lose sync"), st.just(0.0)),
        st.tuples(st.just("reboot"), st.floats(5, 400_000)),
        st.tuples(st.just("reboot in 1970"), st.floats(5, 400_000)),
        st.tuples(st.just("restart"), st.floats(0.5, 600)),
        st.tuples(st.just("producer's time"), st.just(0.0)),
        st.tuples(st.just("old recording"), st.just(0.0)),
    ),
    min_size=1,
    max_size=25,
)


def live(station: Station, members: str, amount: float) -> None:
    """Apply one event to the machine, and let the device handle it."""
    machine = station.machine
    if members == "run":
        for _ in range(3):
            machine.true_us += amount / 3 * S
            station.turn()
        station.health()
    elif members == "rows":
        for _ in range(round(amount)):
            machine.true_us += 0.3 * S
            station.stamp()
        station.commit()
        station.turn()
    elif members == "step":
        machine.set(round(amount))
        machine.true_us += 0.1 * S
        station.turn()
    elif members == "step before the commit":
        station.stamp()
        machine.true_us += 0.2 * S
        machine.set(round(amount))
        machine.true_us += 0.2 * S
        station.stamp()
        station.commit()
        machine.true_us += 0.2 * S
        station.turn()
    elif members == "sync":
        machine.sync(round(amount))
    elif members == "lose sync":
        machine.quality = "restored"
    elif members.startswith("reboot"):
        station.stop()
        # As with fake-hwclock: the clock continues from a time saved some minutes before the shutdown.
        saved = machine.now.wall_us - 600 * S
        machine.reboot(amount, 3 * S if "1970" in members else saved)
        station.start()
    elif members == "restart":
        station.stop()
        machine.true_us += amount * S
        station.start()
    elif members == "producer's time":
        station.turn()
        if machine.now.wall_us < S:
            return
        station.stamp(machine.now.wall_us / 1e6 - 0.1)
        station.truth[-1] -= 0.1 * S
        station.commit()
        station.turn()
    else:
        station.stamp(1_700_000_000.0)
        station.commit()


@settings(max_examples=25, deadline=None)
@given(events=EVENTS, ppm=st.floats(-80, 80), set_at_the_end=st.booleans(), seed=st.integers(0, 999))
def test_the_true_time_lies_within_the_bound_for_any_clock(
    tmp_path_factory: pytest.TempPathFactory, events: list[Event], ppm: float, set_at_the_end: bool, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("clock")
    with pytest.MonkeyPatch.context() as patch:
        station = Station(folder, patch, Machine(rate=1 + ppm * 1e-6))
        station.turn()
        for members, amount in [*events, *([("sync", 0.0)] if set_at_the_end else [])]:
            live(station, members, amount)
        station.turn()
        messages = station.messages()
        shuffled = Random(seed).sample(messages, len(messages))
        received = station.machine.true_us + HOUR
        whole = collect(folder / "whole.db", station, [messages], received)
        pieces = collect(folder / "pieces.db", station, [[item] for item in shuffled], received)
        rows = dated(whole)
        assert rows == dated(pieces)
        assert audit(pieces).passed
        pieces.close()
        whole.close()
        station.stop()
    assert [row.row for row in rows] == list(range(1, len(station.truth) + 1))
    for row, truth in zip(rows, station.truth, strict=True):
        event(row.time_quality)
        assert (row.t_error_us is None) == (row.time_quality in ("producer", "unknown"))
        if row.t_error_us is not None:
            assert abs(row.t_best - truth) <= row.t_error_us, (row, truth - row.t_best)


@pytest.fixture
def station(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Station]:
    made = Station(tmp_path / "device", monkeypatch)
    yield made
    made.stop()


@pytest.fixture
def date(station: Station, fresh: Callable[[], FleetStore]) -> Callable[..., list[Dated]]:
    def find(*, without: Callable[[VerifiedMessage], bool] = lambda _: False, received_us: float = 0.0) -> list[Dated]:
        stored = [message for message in station.messages() if not without(message)]
        store = collect(fresh(), station, [stored], received_us or station.machine.true_us)
        result = dated(store)
        store.close()
        return result

    return find


def rows(station: Station, n: int = 3, gap_s: float = 10.0) -> None:
    for _ in range(n):
        station.machine.true_us += gap_s * S
        station.stamp()
    station.commit()
    station.turn()


def errors(station: Station, result: list[Dated]) -> list[float]:
    return [abs(row.t_best - truth) for row, truth in zip(result, station.truth, strict=True)]


def test_rows_with_a_correct_clock_need_no_extra_bytes(station: Station, date: Callable[..., list[Dated]]) -> None:
    station.turn()
    rows(station)
    [results] = [item.body for item in station.messages() if isinstance(item.body, ResultsPayload)]
    assert results.clocks is None
    result = date()
    assert [row.time_quality for row in result] == ["synced"] * 3
    assert all(row.t_best == row.t and row.t_error_us is not None and row.t_error_us < 1_100_000 for row in result)


def test_a_boot_in_1970_is_anchored_once_the_clock_is_set(station: Station, date: Callable[..., list[Dated]]) -> None:
    station.machine.reboot(100_000, 0)
    station.stop()
    station.start()
    station.turn()
    rows(station)
    station.machine.sync(50_000)
    station.turn()
    rows(station)
    result = date()
    assert [row.time_quality for row in result] == ["anchored"] * 3 + ["synced"] * 3
    assert all(row.t < 1000 * S for row in result[:3])
    assert max(errors(station, result)) <= 60_000


def test_before_the_anchor_the_time_is_unknown(station: Station, date: Callable[..., list[Dated]]) -> None:
    station.machine.reboot(100_000, 0)
    station.stop()
    station.start()
    station.turn()
    rows(station)
    assert [(row.time_quality, row.t_error_us) for row in date()] == [("unknown", None)] * 3


def test_unsynced_boots_keep_order_and_spacing_between_synced_ones(
    station: Station, date: Callable[..., list[Dated]]
) -> None:
    station.turn()
    rows(station)
    for _ in range(3):
        station.stop()
        # Each boot begins at the same time: the wall clock repeats itself.
        station.machine.reboot(3600, TRUE_START_US)
        station.start()
        station.turn()
        rows(station)
    station.stop()
    station.machine.reboot(60, 0)
    station.start()
    station.machine.sync(0)
    station.turn()
    rows(station)
    result = date()
    assert [row.time_quality for row in result] == ["synced"] * 3 + ["interval"] * 9 + ["synced"] * 3
    best = [row.t_best for row in result]
    assert best == sorted(best)
    assert [best[4] - best[3], best[5] - best[4]] == [10 * S, 10 * S]
    assert all(error <= (row.t_error_us or 0) for error, row in zip(errors(station, result), result, strict=True))
    # The device was off for three hours and a minute of the interval; half of it is the unknown share.
    assert all(5400 * S < (row.t_error_us or 0) < 5500 * S for row in result[3:12])


def test_a_commit_that_straddles_a_step_is_cut_where_the_clock_was_set(
    station: Station, date: Callable[..., list[Dated]]
) -> None:
    station.turn()
    station.stamp()
    station.machine.set(-3600 * S)
    station.machine.true_us += 0.5 * S
    station.stamp()
    station.commit()
    station.turn()
    [results] = [item.body for item in station.messages() if isinstance(item.body, ResultsPayload)]
    assert results.clocks == [(1, 1, 1, 0), (2, 1, 2, 1)]
    result = date()
    assert [row.time_quality for row in result] == ["synced", "anchored"]
    assert max(errors(station, result)) <= 20_000


def test_a_segment_seen_only_by_the_intake_has_an_anchor(station: Station, date: Callable[..., list[Dated]]) -> None:
    station.turn()
    station.machine.set(60 * DAY)
    station.machine.true_us += 0.5 * S
    station.stamp()
    station.commit()
    station.machine.sync(0)
    station.turn()
    result = date()
    assert [row.time_quality for row in result] == ["anchored"]
    assert max(errors(station, result)) <= 20_000
    segments = [item.body.evidence["segment"] for item in station.messages() if isinstance(item.body, AuditPayload)]
    assert segments == [1, 2, 1]


def test_rows_of_an_earlier_boot_keep_their_boot_and_segment(
    station: Station, date: Callable[..., list[Dated]]
) -> None:
    station.machine.set(-DAY)
    station.stamp()
    station.commit()
    station.stop()
    station.machine.reboot(5, 0)
    station.start()
    station.machine.sync(0)
    station.turn()
    result = date()
    assert [(row.boot, row.time_quality) for row in result] == [(1, "unknown")]
    anchors = [item.body.evidence for item in station.messages() if isinstance(item.body, AuditPayload)]
    assert [(anchor["boot"], anchor["segment"]) for anchor in anchors] == [(1, 1), (2, 1)]


@pytest.mark.parametrize(
    ("t_s", "how"), [(None, "anchored"), (-2.0, "anchored"), (-3000.0, "producer"), (8.0, "producer")]
)
def test_a_producers_time_is_corrected_only_if_it_was_read_from_this_clock(
    station: Station, date: Callable[..., list[Dated]], t_s: float | None, how: str
) -> None:
    station.machine.set(-HOUR)
    station.turn()
    station.machine.true_us += 60 * S
    station.stamp(None if t_s is None else station.machine.now.wall_us / 1e6 + t_s)
    station.commit()
    station.machine.sync(0)
    station.turn()
    [result] = date()
    assert result.time_quality == how
    assert (result.t_best == result.t) == (how == "producer")


def test_rows_read_before_and_sent_after_a_clock_step_have_the_old_clock(
    station: Station, date: Callable[..., list[Dated]]
) -> None:
    station.machine.set(-HOUR)
    station.turn()
    station.machine.true_us += 60 * S
    read_at = station.machine.now.wall_us / 1e6
    truth = station.machine.true_us
    station.machine.sync(0)
    station.turn()
    station.stamp(read_at)
    station.truth[-1] = truth
    station.commit()
    station.turn()
    result = date()
    assert [row.time_quality for row in result] == ["anchored"]
    assert max(errors(station, result)) <= 20_000


def test_an_anchor_two_years_ahead_is_not_trusted(station: Station, date: Callable[..., list[Dated]]) -> None:
    station.machine.sync(0)
    station.machine.offset_us += 730 * DAY
    station.turn()
    rows(station)
    station.machine.sync(0)
    station.turn()
    result = date()
    assert [row.time_quality for row in result] == ["anchored"] * 3
    assert max(errors(station, result)) <= 20_000


def test_contradicting_anchors_widen_the_bound(station: Station, date: Callable[..., list[Dated]]) -> None:
    station.machine.sync(0)
    station.machine.offset_us -= HOUR
    station.turn()
    rows(station)
    station.machine.sync(0)
    station.turn()
    result = date()
    assert all(abs(error - HOUR) < S for error in errors(station, result))
    assert all(HOUR <= (row.t_error_us or 0) <= HOUR + 3 * S for row in result)


def test_without_anchors_the_time_is_unknown_and_the_audit_passes(
    station: Station, date: Callable[..., list[Dated]]
) -> None:
    station.machine.set(-HOUR)
    station.turn()
    rows(station)
    result = date(without=lambda message: isinstance(message.body, AuditPayload))
    assert [(row.time_quality, row.t_error_us) for row in result] == [("unknown", None)] * 3


def test_invalid_clock_evidence_is_ignored(station: Station, date: Callable[..., list[Dated]]) -> None:
    station.turn()
    rows(station)
    plain = {"boot": 1, "segment": 1, "boot_us": 1, "wall_us": 1, "quality": "synced", "error_us": 0, "step_us": 0}
    for name, value in [("boot", -1), ("segment", "1"), ("boot_us", 2.5), ("wall_us", None), ("quality", "best")]:
        with station.store.transaction() as tx:
            body = {"event": "clock", "summary": "", "evidence": {**plain, name: value}}
            station.author.append(tx, "audit", None, body, station.machine.now)
    with station.store.transaction() as tx:
        # More boots of maximal length than a 64-bit sum can hold, and a trusted one after them.
        for boot in range(2, 1100):
            quality = "unsynced" if boot < 1099 else "synced"
            evidence = {**plain, "boot": boot, "boot_us": 2**53, "quality": quality}
            body = {"event": "clock", "summary": "", "evidence": evidence}
            station.author.append(tx, "audit", None, body, station.machine.now)
    assert [row.time_quality for row in date()] == ["synced"] * 3


def test_the_device_list_has_the_quality_of_each_clock(station: Station, tmp_path: Path) -> None:
    station.turn()
    station.machine.set(-HOUR, "unsynced")
    station.turn()
    store = collect(tmp_path / "fleet.db", station, [station.messages()], station.machine.true_us)
    assert [row["clock"] for row in store.devices()] == ["unsynced"]
    store.close()


@pytest.mark.parametrize("clocks", [[], [[2, 1, 1, 0]], [[1, 1, 1, 0], [1, 1, 2, 0]], [[1, 1, 1, 3]], [[1, 1, 1]]])
def test_clocks_that_contradict_their_message_are_refused(clocks: list[list[int]]) -> None:
    sender = MessageSender()
    assert isinstance(
        sender.verify(sender.results(clocks=[[1, 1, 1, 0], [50, 1, 2, 1]], rows_at=(1, 300))).body, ResultsPayload
    )
    with pytest.raises(MessageRefused, match="malformed payload"):
        sender.verify(sender.results(clocks=clocks, rows_at=(1, 300)))
