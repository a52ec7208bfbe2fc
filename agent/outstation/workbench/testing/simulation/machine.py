"""Simulated machines of one process: which clock, boot id, keys and random ids the code of a device or collector gets.

One thread runs all machines in turn. Keys and ids come from the seed, which makes every message repeatable; so nothing
that is made here may be used outside a simulation.
"""

from __future__ import annotations

import os
import random
import secrets
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from outstation.device.pipeline import batch
from outstation.device.store import cost
from outstation.device.store.cost import MeterReading
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.ml.model.inference import runtime
from outstation.protocol.wire import keys
from outstation.protocol.wire.keys import SigningKey

# The clock error that a time service reports.
_SYNC_ERROR_US = 5_000
# Seconds from a machine's boot until its programs start.
_BOOT_S = 20.0


class Machine(msgspec.Struct):
    """One machine: name, time of its boot, how far its wall clock is from the true time, bytes it wrote to files."""

    name: str = "collector"
    boot_at_s: float = 0.0
    boot: int = 1
    offset_us: int = 0
    is_synced: bool = True
    written_bytes: int = 0


class _StoppedTime:
    """Functions of module `time` by which batches and models measure themselves."""

    @staticmethod
    def thread_time_ns() -> int:
        return 0

    @staticmethod
    def monotonic() -> float:
        return 0.0

    perf_counter = monotonic


def _skip_flush(_descriptor: int) -> None:
    """Flush nothing."""


class MachineRoom:
    """All machines of a simulation. `now_s`: simulated time; `current`: the machine whose code runs.

    Unless it is `is_repeatable`, keys and ids are random: others can read them at a real broker.
    """

    def __init__(self, seed: int, start_us: int, *, is_repeatable: bool = True) -> None:
        self.rng = random.Random(f"simulation/{seed}")
        self.start_us, self.now_s, self._is_repeatable = start_us, 0.0, is_repeatable
        self.current = self.collector = Machine()

    def read(self) -> ClockReading:
        """Read the clock of the current machine."""
        machine = self.current
        wall_us = self.start_us + round(self.now_s * 1e6) + machine.offset_us
        boot_s = self.now_s - machine.boot_at_s + _BOOT_S
        if not machine.is_synced:
            return ClockReading(wall_us, boot_s, "unsynced")
        return ClockReading(wall_us, boot_s, "synced", _SYNC_ERROR_US)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let this process read clocks, keys and ids from here, until the context ends."""
        state = random.getstate()
        random.seed(self.rng.random())
        with (
            clock.simulated(self.read, lambda: f"boot-{self.current.boot}"),
            self._seeded() if self._is_repeatable else nullcontext(),
            # The time that this process and its batches take is not a device's, and differs between runs.
            mock.patch.object(cost.ProcessMeter, "read", self._read_meter),
            mock.patch.object(batch, "time", _StoppedTime),
            mock.patch.object(runtime, "time", _StoppedTime),
            # A simulated power cut keeps what the kernel has; flushing it would take most of the time.
            mock.patch.object(os, "fsync", _skip_flush),
            mock.patch.object(os, "fdatasync", _skip_flush),
        ):
            try:
                yield
            finally:
                random.setstate(state)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Let keys and ids come from the seed."""
        with (
            mock.patch.object(uuid, "uuid4", self._make_uuid),
            mock.patch.object(secrets, "token_bytes", lambda size=32: self.rng.randbytes(size)),
            mock.patch.object(os, "urandom", lambda size: self.rng.randbytes(size)),
            mock.patch.object(keys, "create", self._make_key),
        ):
            yield

    @contextmanager
    def run_as(self, machine: Machine) -> Iterator[None]:
        before, self.current = self.current, machine
        written = cost.read_io("wchar")
        try:
            yield
        finally:
            machine.written_bytes += cost.read_io("wchar") - written
            self.current = before

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave what is written here out of the current machine's `written_bytes`."""
        written = cost.read_io("wchar")
        try:
            yield
        finally:
            self.current.written_bytes -= cost.read_io("wchar") - written

    def _read_meter(self, now: ClockReading) -> MeterReading:
        # Without what the current turn has written so far; the next reading has it.
        return MeterReading(now.boot_s, self.current.written_bytes)

    def _make_uuid(self) -> uuid.UUID:
        return uuid.UUID(int=self.rng.getrandbits(128), version=4)

    def _make_key(self) -> SigningKey:
        return SigningKey(Ed25519PrivateKey.from_private_bytes(self.rng.randbytes(32)))
