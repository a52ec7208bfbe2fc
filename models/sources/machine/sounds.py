"""The sound of a machine that does not exist: a motor with a fan in a hall, sound or with a fault, 16 kHz.

What is in it, by people's knowledge of such machines (Randall and Antoni 2011, for the bearing):

- the motor's hum, 100 Hz and multiples, the louder the load; rotation at 25 Hz less slip, its multiples, and the fan's
  seven blades
- flow: noise that falls with frequency; the bearing's rustle around 3 kHz; the hall, and now and then a clank in it
- load wanders between a fifth and full; every machine has levels, resonances and a microphone of its own

Faults: `bearing`, a pit in the outer race, which each ball strikes (3.58 times a turn, one ball's spacing never quite
the next's) and which rings at the housing's resonances; `loose`, a foot that lost its bolt: multiples and halves of the
rotation, and a rattle once a turn. `severity` 1 is plain to a mechanic's ear, 0.4 slight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RATE = 16_000
SECONDS = 10.0
Doubles = NDArray[np.float64]

_MAINS_HZ, _TURN_HZ, _SLIP = 50.0, 25.0, 0.04
_BLADES, _BALL_PASS = 7, 3.58
_KNOTS_S = 0.5


@dataclass(frozen=True)
class Machine:
    """Levels (factors), resonances (Hz) and the microphone's tilt (dB an octave) of one of them."""

    hum: Doubles  # (6,)
    turn: Doubles  # (8,)
    blades: Doubles  # (4,)
    flow: float
    rustle: float
    ring_hz: Doubles  # (2,)
    tilt: float
    gain: float

    @classmethod
    def of(cls, number: int) -> Machine:
        rng = np.random.default_rng([1, number])

        def about(level: float, *shape: int) -> Doubles:
            return np.asarray(level * np.exp(rng.normal(0, 0.12, shape or None)))

        return cls(
            hum=about(0.05, 6) / np.arange(1, 7),
            turn=about(0.03, 8) / np.arange(1, 9),
            blades=about(0.04, 4) / np.arange(1, 5),
            flow=float(about(0.03)),
            rustle=float(about(0.004)),
            ring_hz=np.array([3100.0, 4700.0]) * (1 + rng.normal(0, 0.02, 2)),
            tilt=float(rng.normal(0, 0.3)),
            gain=float(np.exp(rng.normal(0, 0.06))),
        )


def record(number: int, take: int, fault: str = "none", severity: float = 1.0) -> Doubles:
    """Ten seconds (160,000,) of machine `number`; `take` says which ten, the same ones each time."""
    machine, rng = Machine.of(number), np.random.default_rng([2, number, take])
    n = round(SECONDS * RATE)
    load = _wander(rng, n, 0.2, 1.0)
    turns = np.cumsum(_TURN_HZ * (1 - _SLIP * load)) / RATE
    t = np.arange(n) / RATE
    sound = _tones(rng, _MAINS_HZ * 2 * t, machine.hum) * (0.4 + 0.6 * load)
    sound += _tones(rng, turns, machine.turn) + _tones(rng, _BLADES * turns, machine.blades) * (0.5 + 0.5 * load)
    sound += machine.flow * _noise(rng, n, lambda f: (1 + f / 200) ** -0.8) * (0.6 + 0.4 * load)
    sound += machine.rustle * _noise(rng, n, lambda f: np.exp(-(((f - 3000) / 1200) ** 2))) * (0.7 + 0.3 * load)
    sound += 0.006 * np.exp(rng.normal(0, 0.25)) * _noise(rng, n, lambda f: (1 + f / 80) ** -0.7)
    if rng.random() < 0.2:
        sound += _struck(rng, n, rng.random(1) * SECONDS, np.array([900.0, 2100.0]) * (1 + rng.normal(0, 0.2)), 0.05)
    if fault == "bearing":
        sound += severity * _pit(rng, turns, machine)
    elif fault == "loose":
        sound += severity * _rattle(rng, turns, machine)
    heard = _shaped(sound, lambda f: 10 ** (machine.tilt * np.log2(np.maximum(f, 50) / 1000) / 20))
    heard = machine.gain * heard + 1e-4 * rng.normal(size=n)
    return np.round(np.clip(heard, -1, 1) * 32767) / 32768


def _pit(rng: np.random.Generator, turns: Doubles, machine: Machine) -> Doubles:
    strikes = np.cumsum(1 + rng.normal(0, 0.01, int(turns[-1] * _BALL_PASS))) / _BALL_PASS
    at = np.interp(strikes[strikes < turns[-1]], turns, np.arange(len(turns)) / RATE)
    # Where the load presses is where the pit is struck hardest.
    return _struck(rng, len(turns), at, machine.ring_hz, 0.010)


def _rattle(rng: np.random.Generator, turns: Doubles, machine: Machine) -> Doubles:
    halves = _tones(rng, turns / 2, np.full(16, 0.006))
    once = np.interp(np.arange(1, int(turns[-1])), turns, np.arange(len(turns)) / RATE)
    return halves + _struck(rng, len(turns), once + rng.normal(0, 0.0005, len(once)), np.array([650.0, 1400.0]), 0.015)


def _struck(rng: np.random.Generator, n: int, at_s: Doubles, ring_hz: Doubles, level: float) -> Doubles:
    """Blows at `at_s`, each ringing for some milliseconds."""
    t = np.arange(round(0.02 * RATE)) / RATE
    bell = sum(np.exp(-t / 0.003) * np.sin(2 * np.pi * hz * t) for hz in ring_hz)
    out = np.zeros(n + len(t))
    for begin in (np.clip(at_s, 0, (n - 1) / RATE) * RATE).astype(int):
        out[begin : begin + len(t)] += level * np.exp(rng.normal(0, 0.3)) * bell
    return out[:n]


def _tones(rng: np.random.Generator, turns: Doubles, levels: Doubles) -> Doubles:
    """Multiples of something that has turned so often."""
    phase = rng.random(len(levels))
    return np.asarray(sum(a * np.sin(2 * np.pi * (k * turns + phase[k - 1])) for k, a in enumerate(levels, 1)))


def _noise(rng: np.random.Generator, n: int, shape: object) -> Doubles:
    return _shaped(rng.normal(size=n), shape)


def _shaped(sound: Doubles, shape: object) -> Doubles:
    assert callable(shape)
    return np.fft.irfft(np.fft.rfft(sound) * shape(np.fft.rfftfreq(len(sound), 1 / RATE)), len(sound))


def _wander(rng: np.random.Generator, n: int, low: float, high: float) -> Doubles:
    """A level that changes within seconds, between `low` and `high`."""
    knots = rng.random() + np.cumsum(rng.normal(0, 0.06, int(n / RATE / _KNOTS_S) + 2))
    folded = np.abs((knots % 2) - 1)
    return low + (high - low) * np.interp(np.arange(n) / RATE / _KNOTS_S, np.arange(len(knots)), folded)
