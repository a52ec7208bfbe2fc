"""Retention: acknowledged messages stay for a collector that is restored from a backup; growth is forecast."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.device.store import retention
from outstation.device.store.retention import Growth, append_history, expired_through, uptime_json, uptime_s
from outstation.foundation.clock import ClockReading
from outstation.protocol.transport.packets import OutgoingMessage
from outstation.protocol.wire import jws
from outstation.protocol.wire.messages import AuditPayload
from outstation.protocol.wire.verification import verify_message
from tests.device.uplink.test_uplink import ACK_TOPIC, DEVICE, World, ack_body, once, signed


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def build(*args: Any, **kwargs: Any) -> World:
        made.append(World(tmp_path / str(len(made)), *args, **kwargs))
        return made[-1]

    yield build
    for world in made:
        world.store.close()


@pytest.fixture
def world(make: Callable[..., World]) -> World:
    return make()


def delivered(world: World, n: int = 60) -> None:
    """A day in which everything arrived and was acknowledged."""
    world.write(n)
    world.run(lambda: not world.waiting(), 60)
    assert world.collector.seqs() == set(range(1, n + 1))
    assert world.outbox_seqs() == set(range(1, n + 1))
    world.uplink = world.new_uplink()


def writing(world: World) -> None:
    """Health each minute, as a device has it."""
    minutes = iter(range(10_000))
    began = world.air.clock_s
    due = [next(minutes)]

    def write() -> None:
        if world.air.clock_s >= began + 60 * due[0]:
            due[0] = next(minutes)
            world.write(1)

    world.air.tick_callbacks.append(write)


def restore(world: World, through: int) -> None:
    """Yesterday's backup: everything after `through` is gone."""
    world.collector.stored = {key: value for key, value in world.collector.stored.items() if key[1] <= through}
    world.collector.arrivals.clear()


def evictions(world: World) -> list[AuditPayload]:
    return [body for body in audits(world) if body.event == "evicted"]


def events(world: World) -> list[str]:
    return [body.event for body in audits(world)]


def audits(world: World) -> list[AuditPayload]:
    result = world.store._fetch_all("SELECT topic, payload, jws FROM outbox WHERE topic LIKE '%/audit' ORDER BY seq")
    signer = jws.Signer(DEVICE, world.key.public)
    bodies = [verify_message(t, p, [j], lambda _: signer).body for t, p, j in result]
    return [body for body in bodies if isinstance(body, AuditPayload)]


def test_acknowledged_messages_stay_and_are_not_part_of_the_backlog(world: World) -> None:
    delivered(world)
    assert world.store.outbox_size() == (0, 60)
    assert world.store.unacknowledged_messages(0, 100) == []
    assert world.store.pending_messages([1, 60]) == []
    published = world.health_published()
    world.run(lambda: False, 600)
    assert world.health_published() == published


def test_a_restored_collector_gets_what_it_lost_and_nothing_is_declared(world: World) -> None:
    delivered(world)
    restore(world, 20)
    writing(world)
    world.run(lambda: not world.waiting() and world.air.clock_s > 1300, 900)
    last = int(world.store.get_meta("seq", "0"))
    assert world.collector.seqs() == set(range(1, last + 1))
    assert {seq for seq, times in world.collector.arrivals.items() if seq <= 60 and times} == set(range(21, 61))
    assert evictions(world) == []
    assert world.store.outbox_size() == (0, last)


def test_an_empty_collector_gets_every_stored_message_again(world: World) -> None:
    delivered(world)
    restore(world, 0)
    writing(world)
    world.run(lambda: not world.waiting() and world.air.clock_s > 1300, 900)
    assert world.collector.seqs() == set(range(1, int(world.store.get_meta("seq", "0")) + 1))


def test_deleted_messages_are_declared_with_their_acknowledgement(world: World) -> None:
    delivered(world)
    with world.store.transaction() as tx:
        tx.outbox.drop_acknowledged(40, 100)
    restore(world, 20)
    writing(world)
    world.run(lambda: len(evictions(world)) > 0 and not world.waiting(), 900)
    (body,) = evictions(world)
    assert (body.evidence["seq"], body.evidence["reason"]) == ([[21, 40]], "acknowledged earlier")
    proof = body.evidence["acknowledgement"]
    signer = jws.Signer("collector", world.collector_key.public)
    earlier = verify_message(ACK_TOPIC, proof["payload"].encode(), [proof["jws"]], lambda _: signer).body
    assert earlier.through >= 60  # type: ignore[union-attr]
    assert earlier.missing == []  # type: ignore[union-attr]
    assert set(range(41, 61)) <= world.collector.seqs()


@pytest.mark.parametrize("missing", [[], [(3, 9)], [(1, 60)]])
def test_a_replayed_old_acknowledgement_has_no_effect(world: World, missing: list[tuple[int, int]]) -> None:
    old = signed(world.collector_key, ACK_TOPIC, ack_body(world.store.log_id, 60 if missing else 7, missing))
    delivered(world)
    with world.store.transaction() as tx:
        tx.outbox.drop_acknowledged(30, 100)
    writing(world)
    struck = iter(range(100))

    def strike() -> None:
        if world.air.clock_s > 1010 and next(struck, None) is not None:
            world.deliver(*old)

    world.air.tick_callbacks.append(strike)
    world.collector.arrivals.clear()
    world.run(lambda: False, 600)
    assert next(struck, None) is None
    assert events(world).count("acknowledgement") <= 11
    assert not any(seq <= 60 for seq in world.collector.arrivals)
    assert evictions(world) == []
    assert world.store.acknowledged().missing == ()
    assert world.store.acknowledged().through >= 60


def test_a_doubt_raised_before_a_restart_is_raised_again_and_settled(world: World) -> None:
    delivered(world)
    restore(world, 20)
    acknowledge_again(world, 20)
    world.run(lambda: False, 2)
    assert not any(21 <= seq <= 60 for seq in world.collector.arrivals)
    world.uplink = world.new_uplink()
    writing(world)
    world.run(lambda: not world.waiting() and world.air.clock_s > 1300, 900)
    assert set(range(1, 61)) <= world.collector.seqs()


def test_delivery_broker_deletes_and_remembers_what_the_broker_has(make: Callable[..., World]) -> None:
    world = make(delivery="broker")
    world.air.connect(None, "somebody", subscribe=["outstation/#"], session_expiry_s=9)
    world.write(30)
    world.run(lambda: not world.outbox_seqs(), 60)
    assert world.outbox_seqs() == set()
    assert world.store.acknowledged().ranges == [(1, 30)]
    assert world.store.outbox_size() == (0, 30)


def write_results(world: World, task: str, n: int, size: int = 0) -> None:
    model = {"name": "tiny", "version": "1", "digest": "sha256:" + "0" * 64}
    columns = {"row": [1], "t": [1_764_000_000_000_000], "label": ["left"]}
    body = {"model": model, "stream": "watch", "rows": [1, 1], "n": 1, "input": "sha256:" + "0" * 64}
    for _ in range(n):
        with world.store.transaction() as tx:
            world.author.append(tx, "results", task, {**body, "columns": columns, "pad": "x" * size}, world.air.now())


@pytest.mark.parametrize("restarts", [False, True])
def test_the_newest_results_of_each_task_stay_once_the_broker_has_them(
    make: Callable[..., World], restarts: bool
) -> None:
    world = make(delivery="broker")
    world.air.connect(None, "somebody", subscribe=["outstation/#"], session_expiry_s=3600)
    write_results(world, "rare", 2)
    for _ in range(4):
        world.write(5)
        write_results(world, "often", 10)
        world.run(lambda: not world.waiting(), 60)
        world.uplink = world.new_uplink() if restarts else world.uplink
        world.uplink._stopping.clear()
    newest = {seq for batch in range(2, 4) for seq in range(8 + 15 * batch, 18 + 15 * batch)}
    assert world.outbox_seqs() >= {1, 2} | newest
    assert world.store.outbox_size() == (0, 62)
    with world.store.transaction() as tx:
        tx.outbox.drop_acknowledged(62, 500, spare=["often"])
    assert world.outbox_seqs() == newest, "those of a task that the config no longer has go with the others"
    if not restarts:
        write_results(world, "often", 16)
        world.run(lambda: not world.waiting(), 60)
        assert world.outbox_seqs() == set(range(59, 79))


def test_no_delivered_result_is_left_beyond_the_limits(make: Callable[..., World]) -> None:
    world = make(delivery="broker")
    world.air.connect(None, "somebody", subscribe=["outstation/#"], session_expiry_s=3600)
    write_results(world, "often", 30, size=10_000)
    world.run(lambda: len(world.outbox_seqs()) == 6, 60)
    assert world.outbox_seqs() == set(range(25, 31))
    write_results(world, "often", 1, size=100_000)
    world.uplink = world.new_uplink()
    world.run(lambda: not world.waiting(), 60)
    with world.store.transaction() as tx:
        tx.outbox.drop_acknowledged(31, 500, spare=["often"])
    assert world.outbox_seqs() == {31}, "the last one stays, however large"


def test_a_restored_collector_gets_the_newest_results_again(world: World) -> None:
    write_results(world, "often", 30)
    delivered_seqs = set(range(1, 31))
    world.run(lambda: not world.waiting(), 60)
    with world.store.transaction() as tx:
        tx.outbox.drop_acknowledged(30, 100, spare=["often"])
    restore(world, 0)
    world.uplink = world.new_uplink()
    writing(world)
    world.run(lambda: not world.waiting() and world.air.clock_s > 1300, 900)
    assert world.collector.seqs() & delivered_seqs == set(range(11, 31))
    (body,) = evictions(world)
    assert body.evidence["seq"] == [[1, 10]]


@given(sizes=st.lists(st.integers(1, 80_000), min_size=1, max_size=60))
def test_newest_results_are_the_last_ones_within_count_and_bytes(sizes: list[int]) -> None:
    newest = retention.NewestResults()
    for seq, size in enumerate(sizes, 1):
        newest = retention.NewestResults.from_json(newest.append(seq, size).to_json())
    seqs = sorted(newest.seqs)
    assert seqs == list(range(len(sizes) - len(seqs) + 1, len(sizes) + 1))
    assert len(seqs) == 1 or sum(size for _, size in newest.messages) <= retention.MAX_NEWEST_BYTES
    assert len(seqs) <= retention.MAX_NEWEST_MESSAGES
    assert newest.without(newest.seqs) == retention.NewestResults()


def test_a_retained_acknowledgement_alone_changes_nothing(world: World) -> None:
    delivered(world)
    world.collector.leave()
    payload, token = signed(world.collector_key, ACK_TOPIC, ack_body(world.store.log_id, 20, [(5, 6)]))
    world.air.publish(OutgoingMessage(ACK_TOPIC, payload, (("jws", token),), retain=True))
    world.run(lambda: False, 60)
    assert world.store.acknowledged().through == 60
    assert world.store.acknowledged().missing == ()
    assert world.waiting() == {61}
    assert events(world) == ["acknowledgement"]


def acknowledge_again(world: World, through: int) -> None:
    """Acknowledge messages up to `through`, as a collector does that connects."""
    ack = signed(world.collector_key, ACK_TOPIC, ack_body(world.store.log_id, through, []))
    world.air.tick_callbacks.append(partial(once, world, world.air.clock_s + 0.5, partial(world.deliver, *ack)))


@pytest.mark.parametrize("through", [0, 20, 59])
def test_an_idle_device_sends_what_a_restored_collector_lost_within_seconds(world: World, through: int) -> None:
    delivered(world)
    restore(world, through)
    acknowledge_again(world, through)
    began = world.air.clock_s
    # Nothing is written but by the uplink itself.
    world.run(lambda: world.collector.seqs() >= set(range(1, 62)), 60)
    assert world.collector.seqs() == set(range(1, 62))
    assert world.air.clock_s - began < 10
    assert events(world) == ["acknowledgement"]
    assert evictions(world) == []


def test_a_collector_that_lost_all_gets_it_with_the_next_message(world: World) -> None:
    delivered(world)
    restore(world, 0)
    world.write(1)
    began = world.air.clock_s
    world.run(lambda: world.collector.seqs() >= set(range(1, 62)), 60)
    assert world.collector.seqs() == set(range(1, 62))
    assert world.air.clock_s - began < 5


def test_one_acknowledgement_costs_one_small_write_and_deletes_nothing(world: World) -> None:
    delivered(world, 300)
    steps = json.loads(world.store.get_meta(retention.ACKNOWLEDGED_HISTORY, ""))
    assert len(steps) == 1
    assert len(world.outbox_seqs()) == 300


def at(boot_s: float) -> ClockReading:
    return ClockReading(0, boot_s, "unsynced")


def test_uptime_goes_on_over_boots_and_never_back() -> None:
    assert uptime_s("", 1, at(50.0)) == 50.0
    stored = uptime_json(1, at(50.0), 50.0)
    assert uptime_s(stored, 1, at(80.0)) == 80.0
    assert uptime_s(stored, 2, at(10.0)) == 60.0
    assert uptime_s(stored, 1, at(20.0)) == 50.0


def test_the_history_of_acknowledgements_stays_short() -> None:
    steps = ""
    for at_s in range(0, 400_000, 60):
        steps = append_history(steps, at_s, at_s // 60 + 1, 172_800.0) or steps
    assert len(json.loads(steps)) < 100
    through = expired_through(steps, 400_000, 172_800.0)
    exact = (400_000 - 172_800) // 60 + 1
    assert exact - 61 <= through <= exact
    assert expired_through("", 1e9, 1.0) == 0


MIB = 1 << 20


def grown(hours: float, base_per_h: float, tooth: float = 0.0, period_s: float = 60.0, start: int = MIB) -> Growth:
    """Return growth sampled every ten seconds: a rising base with a sawtooth of period `period_s`."""
    growth = Growth()
    for at_s in range(0, round(hours * 3600), 10):
        growth.add_sample(at_s, round(start + base_per_h * at_s / 3600 + tooth * (at_s % period_s) / period_s))
    return growth


@pytest.mark.parametrize("tooth", [0.0, 50.0 * MIB])
def test_steady_growth_is_measured_through_a_sawtooth(tooth: float) -> None:
    hours = grown(6.0, MIB, tooth).hours_until(101 * MIB)
    assert hours == pytest.approx(94.0, abs=1.0)


def test_what_does_not_grow_has_no_end() -> None:
    assert grown(6.0, 0.0, 50.0 * MIB).hours_until(101 * MIB) is None
    assert grown(6.0, -MIB, start=20 * MIB).hours_until(101 * MIB) is None


def test_there_is_no_forecast_before_there_are_enough_samples() -> None:
    assert Growth().hours_until(MIB) is None
    assert grown(0.4, MIB).hours_until(101 * MIB) is None
    assert grown(0.8, MIB).hours_until(101 * MIB) is not None


def test_an_outage_after_a_quiet_day_is_forecast_within_two_hours() -> None:
    growth = grown(24.0, 0.0)
    for at_s in range(24 * 3600, 26 * 3600, 10):
        growth.add_sample(at_s, round(MIB + MIB * (at_s - 24 * 3600) / 3600))
    assert growth.hours_until(101 * MIB) == pytest.approx(98.0, abs=2.0)


def test_a_restart_goes_on_where_it_was() -> None:
    growth = Growth.from_json(grown(6.0, MIB).to_json())
    assert growth.hours_until(101 * MIB) == pytest.approx(94.0, abs=1.0)
    growth.add_sample(7 * 3600.0, 8 * MIB)
    assert growth.hours_until(101 * MIB) == pytest.approx(94.0, abs=1.0)


@given(st.lists(st.tuples(st.floats(1, 5000), st.integers(0, 2**40)), max_size=200))
def test_it_is_never_negative_and_never_grows_without_bound(steps: list[tuple[float, int]]) -> None:
    growth, at_s = Growth(), 0.0
    for step_s, size in steps:
        at_s += step_s
        growth.add_sample(at_s, size)
        hours = growth.hours_until(2**30)
        assert hours is None or 0.0 <= hours <= 87_600.0
    assert len(growth.samples) <= 145
