"""Simulated machine with faulty clocks and known true time, and a device that runs on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from outstation.device.batch_parts.columns import encode_runs, encode_times
from outstation.device.batch_parts.result_part import _clock_members
from outstation.device.config.config import Config
from outstation.device.intake.group_commit import GroupCommit
from outstation.device.machine.timekeeping import Timekeeper
from outstation.device.recovery.open import open_store
from outstation.device.store.clock_segments import clip_stamps
from outstation.device.store.message_log import MessageLog
from outstation.device.store.rows import RawColumns, validate_columns
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.foundation import clock
from outstation.foundation.clock import ClockQuality, ClockReading
from outstation.foundation.config.quantities import Duration
from outstation.protocol.wire import jws
from outstation.protocol.wire.keys import SigningKey
from outstation.protocol.wire.verification import VerifiedMessage, verify_message
from outstation.workbench.testing.messages import MODEL, new_key
from tests.kit.stations import conf

TRUE_START_US = 1_795_000_000_000_000


@dataclass
class Machine:
    """Both clocks and the true time, µs; `rate` is the real rate of the oscillator."""

    rate: float = 1.0
    true_us: float = float(TRUE_START_US)
    booted_us: float = float(TRUE_START_US) - 5e6
    offset_us: int = TRUE_START_US - 5_000_000
    quality: ClockQuality = "synced"
    error_us: int = 10_000
    synced_at_us: float = 0.0
    boots: int = 1

    @property
    def boot_us(self) -> int:
        return round((self.true_us - self.booted_us) * self.rate)

    @property
    def now(self) -> ClockReading:
        error = self.error_us + round((self.boot_us - self.synced_at_us) * 500e-6)
        return ClockReading(
            self.boot_us + self.offset_us, self.boot_us / 1e6, self.quality, error if self.quality == "synced" else None
        )

    def sync(self, error_us: int) -> None:
        """Let a time service step the clock, with an error of at most `error_us`."""
        self.offset_us = round(self.true_us) + error_us - self.boot_us
        self.quality, self.error_us, self.synced_at_us = "synced", abs(error_us), self.boot_us

    def set(self, by_us: int, quality: ClockQuality = "restored") -> None:
        self.offset_us += by_us
        self.quality = quality

    def reboot(self, off_s: float, wall_us: int, quality: ClockQuality = "unsynced") -> None:
        """Switch off for a while, then boot with a given initial clock."""
        self.true_us += off_s * 1e6
        self.booted_us, self.boots = self.true_us, self.boots + 1
        self.offset_us, self.quality = wall_us, quality
        self.true_us += 3e6


@dataclass
class Dated:
    """A row as the collector dates it."""

    row: int
    t: int
    boot: int
    t_best: int
    t_error_us: int | None
    time_quality: str


@dataclass
class Station:
    """Store, clock watch and intake of a device on that machine; `truth` is the true time of each row, µs."""

    folder: Path
    patch: pytest.MonkeyPatch
    machine: Machine = field(default_factory=Machine)
    key: SigningKey = field(default_factory=lambda: new_key(3))
    truth: list[float] = field(default_factory=list)
    used: int = 0

    def __post_init__(self) -> None:
        made: Config = conf(self.folder)
        # Producers here send any time twice, and late.
        watch = replace(made.streams["watch"], duplicates="accept", allowed_lateness=Duration(1e10))
        self.conf = replace(made, streams={"watch": watch})
        self.start()

    def start(self) -> None:
        """Start the daemon's part; the store counts a boot if the machine had one."""
        self.patch.setattr(clock, "boot_id", lambda: f"boot {self.machine.boots}")
        self.store = open_store(self.folder)
        self.store.declare_streams(self.conf.streams)
        self.author = MessageLog("acme", "pi-07", self.key, self.store.log_id, self.store.boot, 120_000)
        self.keeper = Timekeeper(self.store, self.author)
        self.group = GroupCommit(self.store, self.conf.streams)

    def stop(self) -> None:
        self.store.close()

    def stamp(self, t: float | None = None) -> None:
        """Ingest a row; `t` is its producer's time in seconds."""
        now = self.machine.now
        raw = RawColumns(1, None if t is None else [t], {"ax": [0.0], "ay": [0.0]})
        self.group.add_rows(
            "p", "watch", validate_columns(raw, self.conf.streams["watch"], now.wall_us, None), [1], now
        )
        self.truth.append(self.machine.true_us)

    def commit(self) -> None:
        self.group.advance("p", 1)
        assert not self.group.commit(self.machine.now)["p"].rejected

    def turn(self) -> None:
        """Run one turn of the main loop: check the clock, then process the backlog; each row is a result."""
        now = self.machine.now
        self.keeper.tick(now)
        batch = self.store.read_rows("watch", self.conf.streams["watch"].fields, self.used, 1000)
        if batch is None:
            return
        assert batch.loss_reason is None
        rows = np.arange(batch.first, batch.last + 1)
        columns = {"row": encode_runs(rows), "t": encode_times(batch.rows.t)}
        head = {"model": MODEL, "stream": "watch", "rows": [batch.first, batch.last], "n": len(batch.rows)}
        with self.store.transaction() as tx:
            stamps = clip_stamps(batch.stamps, batch.first, batch.last)
            announced = tx.segments.last_announced_key()
            clocks = _clock_members(stamps, announced if announced[0] == self.author.boot else None)
            body: dict[str, Any] = {**head, "input": "", "columns": columns, **clocks}
            self.author.append(tx, "results", "exercise", body, now)
        self.used = batch.last

    def health(self) -> None:
        with self.store.transaction() as tx:
            now = self.machine.now
            self.author.append(tx, "health", None, {"wall_clock": {"boot_us": now.boot_us}}, now)

    def messages(self) -> list[VerifiedMessage]:
        signer = jws.Signer("pi-07", self.key.public)
        return [
            verify_message(message.topic, message.payload, (message.jws,), lambda _: signer)
            for message in self.store.unacknowledged_messages(0, 100_000)
        ]


def collect(
    where: Path | FleetStore, station: Station, batches: list[list[VerifiedMessage]], received_us: float
) -> FleetStore:
    """Return a collector that received these messages in this order."""
    store = where if isinstance(where, FleetStore) else FleetStore(where)
    store.enrol("pi-07", station.key.public, replace=False, now=clock.to_rfc3339(TRUE_START_US))
    for batch in batches:
        store.ingest([Arrival(message) for message in batch], [], clock.to_rfc3339(round(received_us)))
    return store


def dated(store: FleetStore) -> list[Dated]:
    rows = store.fetch_all("SELECT row, t, boot, t_best, t_error_us, time_quality FROM results_dated ORDER BY row")
    return [Dated(*row) for row in rows]
