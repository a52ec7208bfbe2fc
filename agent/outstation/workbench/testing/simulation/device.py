"""Simulated device: the real store, daemon and uplink of one device, driven in turns at simulated times."""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from outstation.device.bootstrap.daemon import build_daemon
from outstation.device.bootstrap.device import load_config, open_store
from outstation.device.bootstrap.model_host import ModelHost
from outstation.device.config.config import Config
from outstation.device.daemon import Daemon
from outstation.device.intake import label_intake as label_lines
from outstation.device.intake.group_commit import CommitOutcome
from outstation.device.machine.throttle import Throttle
from outstation.device.store.rows import RawColumns, validate_columns
from outstation.device.store.store import Store
from outstation.device.uplink.mqtt_sink import MqttSink
from outstation.device.uplink.sink import Receipt, Sink
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.workbench.testing.simulation.broker_air import BrokerAir
from outstation.workbench.testing.simulation.feed import Block, Feed
from outstation.workbench.testing.simulation.lossy_link import LossyBroker
from outstation.workbench.testing.simulation.machine import Machine, MachineRoom

_METER = "simulation"
_MAX_WAITING_LABELS = 100_000
_DISK_BYTES = 1 << 40


class DueLabel(msgspec.Struct, frozen=True):
    """A label of a task that arrives at `due_s`; `t`: epoch seconds of its row on the device's clock."""

    due_s: float
    task: str
    t: float
    label: Any


# Returns task, row index, delay and value of the labels of a stream's block, from the stream's name.
FindLabels = Callable[[str, Block], list[tuple[str, int, float, Any]]]


class TurnSink(MqttSink):
    """Sink that returns what is there instead of waiting: time passes between the turns."""

    def receive(self, timeout_s: float) -> list[IncomingMessage | Receipt]:
        return super().receive(0.0)


class Tally(msgspec.Struct):
    """Rows of a stream or labels of a task: how many were accepted and rejected, and the first reason."""

    accepted: int = 0
    rejected: int = 0
    reason: str = ""

    def add(self, outcome: CommitOutcome, n: int) -> None:
        """Add the outcome of a commit of `n` rows or labels."""
        self.accepted += outcome.accepted
        self.rejected += n - outcome.accepted
        self.reason = self.reason or next((reason for _, reason in outcome.rejected), "")


def sum_tallies(tallies: Iterable[Mapping[str, Tally]]) -> dict[str, Tally]:
    """Add up the tallies of all devices by name."""
    total: dict[str, Tally] = {}
    for name, tally in chain.from_iterable(each.items() for each in tallies):
        known = total.get(name, Tally())
        total[name] = Tally(
            known.accepted + tally.accepted, known.rejected + tally.rejected, known.reason or tally.reason
        )
    return total


class SimulatedDevice:
    """A device in `home`, which enrolment filled: `start` it, `cut_power`. All turns read its own machine's clock."""

    _conf: Config

    def __init__(
        self,
        name: str,
        home: Path,
        room: MachineRoom,
        air: LossyBroker | BrokerAir,
        feeds: Mapping[str, Feed],
        models: ModelHost,
        find_labels: FindLabels,
    ) -> None:
        self.name, self.machine = name, Machine(name)
        self.rows: dict[str, Tally] = {}
        self.labels: dict[str, Tally] = {}
        self.silenced: set[str] = set()
        self.is_disk_full = False
        self.home, self._room, self._air, self._feeds = home, room, air, dict(feeds)
        self._models, self._find_labels = models, find_labels
        self._labels: deque[DueLabel] = deque()
        self._store: Store | None = None
        self._daemon: Daemon | None = None
        self._uplink_turns: Generator[float, None, None] | None = None

    @property
    def is_on(self) -> bool:
        return self._daemon is not None

    @property
    def is_connected(self) -> bool:
        """Return True if the uplink has a session that what comes in may wake."""
        return self._daemon is not None and self._daemon.uplink.state == "connected"

    @property
    def wants_tick(self) -> bool:
        """Return True if something has woken the daemon since its last turn."""
        return self._daemon is not None and not self._daemon.signals.is_quiet

    @property
    def store(self) -> Store:
        assert self._store is not None
        return self._store

    @property
    def commit_interval_s(self) -> float:
        return max(1.0, float(self._conf.buffer.commit_every))

    def start(self) -> None:
        """Boot the machine and start the daemon. Raises UsageError, ConfigError, StorageError."""
        self.machine.boot_at_s = self._room.now_s
        with self._room.run_as(self.machine):
            file, self._conf = load_config(str(self.home / "outstation.toml"))
            self._store = open_store(self._conf)
            self._store.begin_simulation()
            self._simulate_disk()
            self._daemon = build_daemon(
                *(file, self._conf, self._store), now=self._room.read, open_sink=self._open_sink, host=self._models
            )
            # This machine's temperature is not the device's.
            self._daemon.throttle = Throttle(self._conf.throttle, self.home / "no-sensors")
            self._daemon.begin()
        self._uplink_turns = self._daemon.uplink.turns()
        for feed in self._feeds.values():
            # A row that is due at the boot is stored: the sensor starts with its device.
            feed.skip(math.nextafter(self._room.now_s, -math.inf))

    def cut_power(self) -> None:
        """Kill the daemon: what it had not committed is gone, and its files stay as they are at this moment."""
        data, cut = self._conf.data_dir, self.home / "cut"
        shutil.copytree(data, cut, ignore=shutil.ignore_patterns("*.sock"))
        self.close()
        shutil.rmtree(data)
        cut.rename(data)
        self.machine.boot += 1

    def close(self) -> None:
        """End the connection and close the files."""
        if self._uplink_turns is not None:
            with self._room.run_as(self.machine):
                self._uplink_turns.close()
        self._uplink_turns = self._daemon = None
        if self._store is not None:
            with self._room.run_as(self.machine):
                self._store.close()
            self._store = None

    def set_disk_full(self, *, is_full: bool) -> None:
        self.is_disk_full = is_full
        if self._store is not None:
            self._simulate_disk()

    def _simulate_disk(self) -> None:
        # The same on any machine: messages of health say when it will be full.
        self.store.simulate_disk(_DISK_BYTES, 0 if self.is_disk_full else _DISK_BYTES // 2)

    def tick(self) -> float:
        """Run a turn of the daemon; return the seconds until the next one. Raises the error that stopped it."""
        assert self._daemon is not None
        with self._room.run_as(self.machine):
            self._daemon.signals.wait(0.0)
            wait_s = self._daemon.tick(self._room.read())
        if self._daemon.signals.failure is not None:
            raise self._daemon.signals.failure
        return wait_s

    def turn_uplink(self) -> float:
        """Run a turn of the uplink; return the seconds until the next one, unless something comes in before."""
        assert self._uplink_turns is not None
        with self._room.run_as(self.machine):
            return next(self._uplink_turns, float("inf"))

    def commit_rows(self) -> None:
        """Commit the rows and labels that are due."""
        assert self._daemon is not None
        with self._room.run_as(self.machine):
            for stream, feed in self._feeds.items():
                if stream in self.silenced:
                    feed.skip(self._room.now_s)
                    continue
                while (block := feed.next_block(self._room.now_s)) is not None:
                    if not self._commit_block(stream, block):
                        feed.put_back(block)
                        break
            self._commit_labels()

    def stop_feeds(self) -> None:
        """Send no more rows and labels."""
        self._feeds.clear()
        self._labels.clear()

    def has_unsent(self) -> bool:
        """Return True if messages wait for their acknowledgement."""
        return bool(self.store.unacknowledged_messages(0, 1))

    def _open_sink(self, topics: Sequence[str], will: OutgoingMessage) -> Sink:
        return TurnSink(self._air.connect(self._conf.broker, self.name, subscribe=topics, will=will))

    def _commit_block(self, stream: str, block: Block) -> bool:
        """Commit rows as the intake does; return False if the store is full."""
        assert self._daemon is not None
        now, group = self._room.read(), self._daemon.intake.group_commit
        offset_us = self._room.start_us + self.machine.offset_us
        t = np.rint(block.due_s * 1e6).astype(np.int64) + offset_us
        raw = RawColumns(len(t), t, block.columns, nan_is_missing=True, t_in_us=True)
        validated = validate_columns(raw, self._conf.streams[stream], now.wall_us, None)
        numbers = [i for i in range(1, raw.n + 1) if i - 1 not in validated.rejected]
        # Recordings: rows of a clock that was set back are older than those before.
        group.add_rows(self, stream, validated, numbers, now, is_recording=True)
        for index, reason in validated.rejected.items():
            group.reject(self, index + 1, reason)
        group.advance(self, raw.n)
        outcome = group.commit(now)[self]
        if outcome.is_store_full:
            return False
        self.rows.setdefault(stream, Tally()).add(outcome, raw.n)
        if len(self._labels) < _MAX_WAITING_LABELS:
            for task, index, delay_s, value in self._find_labels(stream, block):
                self._labels.append(DueLabel(float(block.due_s[index]) + delay_s, task, t[index] / 1e6, value))
        return True

    def _commit_labels(self) -> None:
        due: dict[str, list[DueLabel]] = {}
        while self._labels and self._labels[0].due_s <= self._room.now_s:
            label = self._labels.popleft()
            due.setdefault(label.task, []).append(label)
        assert self._daemon is not None
        now, group = self._room.read(), self._daemon.intake.group_commit
        for task, labels in due.items():
            columns = {
                "t": [label.t for label in labels],
                "label": [label.label for label in labels],
                "source": ["system"] * len(labels),
            }
            batch = msgspec.structs.replace(label_lines.parse_columns(task, columns), by=_METER)
            group.add_labels(self, batch, 1, now)
            group.advance(self, 1)
            outcome = group.commit(now)[self]
            self.labels.setdefault(task, Tally()).add(outcome, len(labels))
