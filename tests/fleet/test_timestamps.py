"""When results really were: whatever a device's clock did, the truth lies within the bound that the collector gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from agent.errors import MessageRefused
from agent.fleet.audit.audit import audit
from agent.fleet.database.store import FleetStore
from agent.testing.messages import MessageSender
from agent.wire.messages import AuditPayload, ResultsPayload, VerifiedMessage
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


def live(station: Station, what: str, amount: float) -> None:
    """One thing that happens to the machine, and what the device makes of it."""
    machine = station.machine
    if what == "run":
        for _ in range(3):
            machine.true_us += amount / 3 * S
            station.turn()
        station.health()
    elif what == "rows":
        for _ in range(round(amount)):
            machine.true_us += 0.3 * S
            station.stamp()
        station.commit()
        station.turn()
    elif what == "step":
        machine.set(round(amount))
        machine.true_us += 0.1 * S
        station.turn()
    elif what == "step before the commit":
        station.stamp()
        machine.true_us += 0.2 * S
        machine.set(round(amount))
        machine.true_us += 0.2 * S
        station.stamp()
        station.commit()
        machine.true_us += 0.2 * S
        station.turn()
    elif what == "sync":
        machine.sync(round(amount))
    elif what == "lose sync":
        machine.quality = "restored"
    elif what.startswith("reboot"):
        station.stop()
        # As fake-hwclock has it: the time that was saved some minutes before the end, and the time off never was.
        saved = machine.now.wall_us - 600 * S
        machine.reboot(amount, 3 * S if "1970" in what else saved)
        station.start()
    elif what == "restart":
        station.stop()
        machine.true_us += amount * S
        station.start()
    elif what == "producer's time":
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
def test_the_true_time_of_every_row_lies_within_its_bound_whatever_the_clock_did(
    tmp_path_factory: pytest.TempPathFactory, events: list[Event], ppm: float, set_at_the_end: bool, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("clock")
    with pytest.MonkeyPatch.context() as patch:
        station = Station(folder, patch, Machine(rate=1 + ppm * 1e-6))
        station.turn()
        for what, amount in [*events, *([("sync", 0.0)] if set_at_the_end else [])]:
            live(station, what, amount)
        station.turn()
        messages = station.messages()
        shuffled = Random(seed).sample(messages, len(messages))
        received = station.machine.true_us + HOUR
        whole = collect(folder / "whole.db", station, [messages], received)
        pieces = collect(folder / "pieces.db", station, [[one] for one in shuffled], received)
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
        kept = [message for message in station.messages() if not without(message)]
        store = collect(fresh(), station, [kept], received_us or station.machine.true_us)
        found = dated(store)
        store.close()
        return found

    return find


def rows(station: Station, n: int = 3, gap_s: float = 10.0) -> None:
    for _ in range(n):
        station.machine.true_us += gap_s * S
        station.stamp()
    station.commit()
    station.turn()


def errors(station: Station, found: list[Dated]) -> list[float]:
    return [abs(row.t_best - truth) for row, truth in zip(found, station.truth, strict=True)]


def test_rows_of_a_clock_that_is_right_cost_no_byte_more_and_keep_their_time(
    station: Station, date: Callable[..., list[Dated]]
) -> None:
    station.turn()
    rows(station)
    [results] = [one.body for one in station.messages() if isinstance(one.body, ResultsPayload)]
    assert results.clocks is None
    found = date()
    assert [row.time_quality for row in found] == ["synced"] * 3
    assert all(row.t_best == row.t and row.t_error_us is not None and row.t_error_us < 1_100_000 for row in found)


def test_a_boot_in_1970_is_dated_once_the_clock_is_set(station: Station, date: Callable[..., list[Dated]]) -> None:
    station.machine.reboot(100_000, 0)
    station.stop()
    station.start()
    station.turn()
    rows(station)
    station.machine.sync(50_000)
    station.turn()
    rows(station)
    found = date()
    assert [row.time_quality for row in found] == ["anchored"] * 3 + ["synced"] * 3
    assert all(row.t < 1000 * S for row in found[:3])
    assert max(errors(station, found)) <= 60_000


def test_before_the_anchor_came_nothing_is_claimed(station: Station, date: Callable[..., list[Dated]]) -> None:
    station.machine.reboot(100_000, 0)
    station.stop()
    station.start()
    station.turn()
    rows(station)
    assert [(row.time_quality, row.t_error_us) for row in date()] == [("unknown", None)] * 3


def test_boots_that_were_never_set_lie_in_order_and_spaced_as_they_were_between_those_that_were(
    station: Station, date: Callable[..., list[Dated]]
) -> None:
    station.turn()
    rows(station)
    for _ in range(3):
        station.stop()
        # Each begins with the same time: the wall clock repeats itself.
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
    found = date()
    assert [row.time_quality for row in found] == ["synced"] * 3 + ["interval"] * 9 + ["synced"] * 3
    best = [row.t_best for row in found]
    assert best == sorted(best)
    assert [best[4] - best[3], best[5] - best[4]] == [10 * S, 10 * S]
    assert all(error <= (row.t_error_us or 0) for error, row in zip(errors(station, found), found, strict=True))
    # Three hours and a minute of being off are in the interval: half of them is what nobody can know.
    assert all(5400 * S < (row.t_error_us or 0) < 5500 * S for row in found[3:12])


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
    [results] = [one.body for one in station.messages() if isinstance(one.body, ResultsPayload)]
    assert results.clocks == [(1, 1, 1, 0), (2, 1, 2, 1)]
    found = date()
    assert [row.time_quality for row in found] == ["synced", "anchored"]
    assert max(errors(station, found)) <= 20_000


def test_a_segment_that_only_the_intake_saw_has_an_anchor_all_the_same(
    station: Station, date: Callable[..., list[Dated]]
) -> None:
    station.turn()
    station.machine.set(60 * DAY)
    station.machine.true_us += 0.5 * S
    station.stamp()
    station.commit()
    station.machine.sync(0)
    station.turn()
    found = date()
    assert [row.time_quality for row in found] == ["anchored"]
    assert max(errors(station, found)) <= 20_000
    segments = [one.body.evidence["segment"] for one in station.messages() if isinstance(one.body, AuditPayload)]
    assert segments == [1, 2, 1]


def test_rows_of_yesterdays_boot_that_are_run_today_keep_their_boot_and_segment(
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
    found = date()
    assert [(row.boot, row.time_quality) for row in found] == [(1, "unknown")]
    anchors = [one.body.evidence for one in station.messages() if isinstance(one.body, AuditPayload)]
    assert [(anchor["boot"], anchor["segment"]) for anchor in anchors] == [(1, 1), (2, 1)]


@pytest.mark.parametrize(
    ("t_s", "how"), [(None, "anchored"), (-2.0, "anchored"), (-3000.0, "producer"), (8.0, "producer")]
)
def test_a_time_that_the_producer_gave_is_only_corrected_if_it_was_plainly_read_from_this_clock(
    station: Station, date: Callable[..., list[Dated]], t_s: float | None, how: str
) -> None:
    station.machine.set(-HOUR)
    station.turn()
    station.machine.true_us += 60 * S
    station.stamp(None if t_s is None else station.machine.now.wall_us / 1e6 + t_s)
    station.commit()
    station.machine.sync(0)
    station.turn()
    [found] = date()
    assert found.time_quality == how
    assert (found.t_best == found.t) == (how == "producer")


def test_a_producer_that_hands_over_late_what_it_read_before_the_step_is_dated_by_the_clock_of_then(
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
    found = date()
    assert [row.time_quality for row in found] == ["anchored"]
    assert max(errors(station, found)) <= 20_000


def test_a_time_service_that_lies_two_years_ahead_is_not_believed_by_the_collector(
    station: Station, date: Callable[..., list[Dated]]
) -> None:
    station.machine.sync(0)
    station.machine.offset_us += 730 * DAY
    station.turn()
    rows(station)
    station.machine.sync(0)
    station.turn()
    found = date()
    assert [row.time_quality for row in found] == ["anchored"] * 3
    assert max(errors(station, found)) <= 20_000


def test_anchors_that_contradict_each_other_widen_the_bound_by_as_much(
    station: Station, date: Callable[..., list[Dated]]
) -> None:
    station.machine.sync(0)
    station.machine.offset_us -= HOUR
    station.turn()
    rows(station)
    station.machine.sync(0)
    station.turn()
    found = date()
    assert all(abs(error - HOUR) < S for error in errors(station, found))
    assert all(HOUR <= (row.t_error_us or 0) <= HOUR + 3 * S for row in found)


def test_without_its_anchors_a_boot_claims_nothing_and_the_audit_does_not_mind_derived_tables(
    station: Station, date: Callable[..., list[Dated]]
) -> None:
    station.machine.set(-HOUR)
    station.turn()
    rows(station)
    found = date(without=lambda message: isinstance(message.body, AuditPayload))
    assert [(row.time_quality, row.t_error_us) for row in found] == [("unknown", None)] * 3


def test_evidence_that_is_nonsense_dates_nothing_and_stops_nobody(
    station: Station, date: Callable[..., list[Dated]]
) -> None:
    station.turn()
    rows(station)
    plain = {"boot": 1, "segment": 1, "boot_us": 1, "wall_us": 1, "quality": "synced", "error_us": 0, "step_us": 0}
    for name, value in [("boot", -1), ("segment", "1"), ("boot_us", 2.5), ("wall_us", None), ("quality", "best")]:
        with station.store.transaction() as tx:
            body = {"event": "clock", "summary": "", "evidence": {**plain, name: value}}
            station.author.append(tx, "audit", None, body, station.machine.now)
    with station.store.transaction() as tx:
        # More boots, each as long as can be said, than a sum of 64 bits holds; and one after them that is believed.
        for boot in range(2, 1100):
            quality = "unsynced" if boot < 1099 else "synced"
            evidence = {**plain, "boot": boot, "boot_us": 2**53, "quality": quality}
            body = {"event": "clock", "summary": "", "evidence": evidence}
            station.author.append(tx, "audit", None, body, station.machine.now)
    assert [row.time_quality for row in date()] == ["synced"] * 3


def test_the_collectors_list_of_devices_says_how_good_each_clock_is(station: Station, tmp_path: Path) -> None:
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
