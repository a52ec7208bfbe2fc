"""Clock faults: a wrong wall clock, clock steps and backward jumps while the device timestamps rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from random import Random

from outstation.workbench.testing.patience import wait_until
from scripts.faults import fault
from scripts.faults.clock import Clock, no_boot, no_clock
from scripts.faults.stamped import Stamped
from scripts.faults.world import Setting, World
from scripts.kit.process_stats import cpu_s

_HOUR_S, _DAY_S, _YEAR_S = 3600.0, 86_400.0, 365.25 * 86_400.0
_CALM_S = 1.5
_ZONE = "Europe/Helsinki"
_NIGHTLY = "nightly"
_PASSING_S = 2.5
# A busy machine delays the daemon's start and commits; the faults do not depend on that.
_SLOW_S = 90.0
# Midnight UTC, and the number of task runs expected at each minute after it. In autumn 3:30 local time is at 0:30 and
# again at 1:30 UTC; in spring it would be at 1:30 UTC.
_NIGHTS = (
    (datetime(2026, 10, 25, tzinfo=UTC), ((30, 1), (90, 0))),
    (datetime(2027, 3, 28, tzinfo=UTC), ((30, 0), (90, 1))),
)


def on_clock(world: World, zone: str = "UTC") -> None:
    """Install controllable clocks, and a sensor whose rows the device timestamps; for `Setting.prepare`."""
    world.companions.append(Stamped(world, world.rng))
    Clock.in_world(world).make(zone)


def on_nights(world: World) -> None:
    """Install clocks in a zone with summer time, and a task due at 3:30 each night."""
    on_clock(world, _ZONE)
    bundle = world.folder / "bundle" / "bundle"
    world.device.append_config(
        f'[tasks.{_NIGHTLY}]\nstream = "stamped"\nbundle = "{bundle}"\nschedule = "30 3 * * *"\n'
    )


_CLOCK = Setting(prepare=(on_clock,), missing=no_clock)
_BOOT = Setting(prepare=(on_clock,), missing=no_boot)


@contextmanager
def _calm(world: World) -> Iterator[None]:
    """Check that a clock change costs the daemon no extra work: less than one second of processor time."""
    pid = world.device.pid
    before = cpu_s(pid)
    time.sleep(_CALM_S)
    usual = cpu_s(pid) - before
    yield
    before = cpu_s(pid)
    time.sleep(_CALM_S)
    if world.device.is_running and world.device.pid == pid:
        used = cpu_s(pid) - before
        assert used < usual + 1.0, f"{used:.2f} s of processor time within {_CALM_S} s of a step, {usual:.2f} s before"


def _step(world: World, rng: Random, ahead_s: float) -> None:
    clock = Clock.in_world(world)
    with _calm(world):
        clock.show(ahead_s, error_us=None)
    time.sleep(rng.uniform(0.0, 0.5))
    clock.show(0.0)


@fault(_CLOCK)
def clock_plus_60_days(world: World, rng: Random) -> None:
    _step(world, rng, 60 * _DAY_S)


@fault(_CLOCK)
def clock_minus_1_hour(world: World, rng: Random) -> None:
    _step(world, rng, -_HOUR_S)


@fault(_CLOCK)
def clock_plus_2_years(world: World, rng: Random) -> None:
    _step(world, rng, 2 * _YEAR_S)


@fault(_CLOCK)
def clock_steps_all_the_time(world: World, rng: Random) -> None:
    clock = Clock.in_world(world)
    for _ in range(30):
        ahead_s = rng.choice((-_HOUR_S, -90.0, -2.0, 0.0, 2.0, 300.0, 60 * _DAY_S, rng.uniform(-1e4, 1e4)))
        clock.show(ahead_s, error_us=None)
        time.sleep(rng.uniform(0.0, 0.2))
    clock.show(0.0)


@fault(_BOOT)
def clock_starts_in_1970(world: World, rng: Random) -> None:
    clock = Clock.in_world(world)
    time.sleep(rng.uniform(0.1, 0.5))
    switch_off(world)
    clock.show(rng.uniform(0.0, 60.0) - time.time(), error_us=None)
    switch_on(world)
    stamp_some(world)
    clock.show(0.0)


@fault(_BOOT)
def clock_restored_after_power_cut(world: World, rng: Random) -> None:
    clock = Clock.in_world(world)
    time.sleep(rng.uniform(0.1, 0.5))
    switch_off(world)
    clock.show(-rng.uniform(1.0, _HOUR_S), error_us=None)
    switch_on(world)
    stamp_some(world)
    clock.show(0.0)


@fault(_BOOT)
def two_boots_without_sync(world: World, rng: Random) -> None:
    clock = Clock.in_world(world)
    for _ in range(2):
        switch_off(world)
        clock.show(-rng.uniform(1.0, _HOUR_S), error_us=None)
        switch_on(world)
        stamp_some(world)
    switch_off(world)
    clock.show(0.0)
    switch_on(world)


@fault(_CLOCK)
def time_service_lies(world: World, rng: Random) -> None:
    clock = Clock.in_world(world)
    time.sleep(rng.uniform(0.1, 0.5))
    clock.show(rng.choice((200.0, -200.0, _HOUR_S, -_HOUR_S, 2 * _YEAR_S)))
    time.sleep(rng.uniform(0.5, 1.5))
    clock.show(0.0)


@fault(_BOOT)
def control_clock_wrong_for_a_boot(world: World, rng: Random) -> None:
    switch_off(world)
    Clock.in_world(world).show(180.0 + rng.uniform(0.0, 20.0))
    switch_on(world)
    stamp_some(world)


@fault(Setting(prepare=(on_nights,), missing=no_clock))
def night_of_summer_time(world: World, rng: Random) -> None:
    midnight, runs = rng.choice(_NIGHTS)
    _pass(world, midnight.timestamp(), None)
    for minutes, expected in runs:
        _pass(world, midnight.timestamp() + minutes * 60.0, expected)
    Clock.in_world(world).show(0.0)


def _pass(world: World, moment_s: float, expected: int | None) -> None:
    """Let the clock pass a moment, and return how often the nightly task ran."""
    clock = Clock.in_world(world)
    before = clock.runs(_NIGHTLY)
    _come_before(world, moment_s)
    time.sleep(_PASSING_S)
    if expected:
        wait_until("the nightly task runs", lambda: clock.runs(_NIGHTLY) > before, _SLOW_S)
    runs = _settled(clock) - before
    at = datetime.fromtimestamp(moment_s, UTC)
    assert expected is None or runs == expected, f"{runs} runs instead of {expected} at {at:%Y-%m-%d %H:%M} UTC"


def _settled(clock: Clock) -> int:
    """Return how often the nightly task has run once it stops; a busy machine runs due tasks late."""
    runs = clock.runs(_NIGHTLY)
    while True:
        time.sleep(_PASSING_S)
        if (now := clock.runs(_NIGHTLY)) == runs:
            return runs
        runs = now


def _come_before(world: World, moment_s: float) -> None:
    """Set the clock shortly before a moment, so that the daemon observes the time before it."""
    clock, lead_s = Clock.in_world(world), 1.0
    while True:
        noticed, shown_s = _steps_noticed(world), time.time()
        clock.show(moment_s - lead_s - shown_s, error_us=None)
        _await_step(world, noticed)
        if time.time() - shown_s < lead_s - 0.2:
            time.sleep(max(0.0, lead_s - 1.0 - (time.time() - shown_s)))
            return
        # The machine is busy: retry with more time.
        lead_s *= 2


def _await_step(world: World, noticed: int) -> None:
    wait_until("the daemon notices the step", lambda: _steps_noticed(world) > noticed, _SLOW_S)


def _steps_noticed(world: World) -> int:
    return world.device.log.read_text(encoding="utf-8", errors="replace").count("the clock was set by")


def switch_off(world: World) -> None:
    """Switch the machine off until `switch_on`."""
    world.kill(world.device)


def switch_on(world: World) -> None:
    """Boot the machine."""
    Clock.in_world(world).boot()
    world.keep(world.device)


def stamp_some(world: World) -> None:
    """Wait until the device has timestamped more rows."""
    [stamped] = [companion for companion in world.companions if isinstance(companion, Stamped)]
    rows = stamped.truth.rows
    before = len(rows)
    wait_until("the device stamps rows", lambda: len(rows) >= before + 5, _SLOW_S)
