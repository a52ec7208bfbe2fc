"""Test rig of a device, an in-memory broker and a collector, wired as the commands do, with one accelerated clock.

The uplink runs on this thread. While it waits, `Air` advances time and runs sensor, daemon and collector.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.device.bootstrap.daemon import build_daemon
from outstation.device.bootstrap.device import load_config, open_store
from outstation.device.intake.group_commit import GroupCommit
from outstation.device.intake.protocol import LineParser
from outstation.device.uplink.mqtt_sink import MqttSink
from outstation.fleet.audit.audit import audit
from outstation.fleet.audit.audit_report import AuditReport
from outstation.fleet.collector.collector import Collector
from outstation.fleet.collector.subscriptions import topic_filters
from outstation.fleet.database.sqlite import SqliteDatabase
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import enrol_on_this_machine, init_fleet
from outstation.foundation.errors import LinkDown
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.wire.keys import load_private
from outstation.workbench.testing.fleet import FIELDS, field_tables
from outstation.workbench.testing.simulation.lossy_link import LinkConditions, LossyBroker, LossyLink

FLEET, DEVICE, STREAM, TASK = "acme", "pi-01", "watch", "exercise"
RECORDING = Path(__file__).parents[2] / "models/recordings/exercise.npz"
_SESSION_S = 86_400
_DRAIN_S = 120.0


class Rig:
    """The rig; the caller closes it.

    `rate` rows per second, committed each `commit_s`; `toml` extends the device's config.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        weather: LinkConditions,
        *,
        rate: float = 10.0,
        commit_s: float = 10.0,
        buffer_toml: str = "",
        schedule: str = "every 60 s",
    ) -> None:
        random.seed(seed)
        self.air = LossyBroker(seed, weather)
        home = folder / "fleet"
        config = init_fleet(home, FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
        self.fleet = FleetStore(Path(config.fleet.db))
        # The collector only has to respond; the page cache of its database would hide the memory use of the device.
        assert isinstance(self.fleet._database, SqliteDatabase)
        self.fleet._database.connection.execute("PRAGMA cache_size=-500")
        self._folder = enrol_on_this_machine(home, config, self.fleet, DEVICE, folder / DEVICE)
        self._configure(buffer_toml, schedule)
        file, conf = load_config(str(self._folder / "outstation.toml"))
        self.store = open_store(conf)
        self.daemon = build_daemon(
            *(file, conf, self.store),
            now=self.air.now,
            open_sink=lambda topics, will: MqttSink(self.air.connect(None, DEVICE, subscribe=topics, will=will)),
            pause=self.air.advance,
        )
        self._uplink = self.daemon.uplink
        self.sensor = Sensor(GroupCommit(self.store, conf.streams), LineParser(conf.streams), self.air, rate, commit_s)
        self._collector = Collector(FLEET, BrokerConfig(), self.fleet, load_private(home / "collector.key"))
        self._collector_link: LossyLink | None = None
        self._due_s = 0.0
        self.air.tick_callbacks += [self.sensor.turn, self._turn_daemon, self._turn_collector]

    def run(self, seconds: float) -> None:
        """Advance the simulated time, then send the waiting messages. Raises errors that are fatal to the daemon."""
        end = self.air.clock_s + seconds
        self.daemon.begin()

        def watch() -> None:
            if self.air.clock_s >= end and not self.sensor.ended:
                self.sensor.ended = True
                self._uplink.request_stop(_DRAIN_S)

        self.air.tick_callbacks.append(watch)
        self._uplink.run()
        # Messages still under way at the broker.
        self.air.advance(_DRAIN_S)

    def each(self, seconds: float, do: Callable[[], None]) -> None:
        """Call `do` at this interval."""
        due_s = self.air.clock_s + seconds

        def watch() -> None:
            nonlocal due_s
            if self.air.clock_s >= due_s:
                due_s += seconds
                do()

        self.air.tick_callbacks.append(watch)

    def audit(self) -> AuditReport:
        return audit(self.fleet)

    def close(self) -> None:
        self.store.close()
        self.fleet.close()

    def _turn_daemon(self) -> None:
        if self.daemon.signals.failure is not None:
            raise self.daemon.signals.failure
        if not self.sensor.ended and self.air.clock_s >= self._due_s:
            self._due_s = self.air.clock_s + self.daemon.tick(self.air.now())

    def _turn_collector(self) -> None:
        try:
            if self._collector_link is None:
                self._collector_link = self.air.connect(
                    None, "collector", subscribe=topic_filters(FLEET), session_expiry_s=_SESSION_S
                )
            self._collector.tick(self._collector_link, 0.0)
        except LinkDown:
            self._collector.acknowledger.requeue_in_flight()
            self._collector_link = None
        # The in-memory broker records published messages for tests.
        self.air.published.clear()

    def _configure(self, buffer_toml: str, schedule: str) -> None:
        path = self._folder / "outstation.toml"
        names = ", ".join(field_tables(FIELDS))
        path.write_text(
            f"{path.read_text(encoding='utf-8')}\n[buffer]\n{buffer_toml}\n[streams.{STREAM}]\nfields = [{names}]\n"
            f'[tasks.{TASK}]\nstream = "{STREAM}"\nbundle = "exercise"\nschedule = "{schedule}"\n',
            encoding="utf-8",
        )


class Sensor:
    """Sensor that repeats a recording, in lines of columns that are parsed and committed as the intake does."""

    def __init__(self, group: GroupCommit, reader: LineParser, air: LossyBroker, rate: float, commit_s: float) -> None:
        self.accepted = 0
        self.ended = False
        self._group, self._reader, self._air = group, reader, air
        self._step_s, self._n = 1.0 / rate, round(rate * commit_s)
        self._lines = self._at = 0
        self._due_s = air.clock_s + commit_s
        self._commit_s = commit_s
        with np.load(RECORDING) as recorded:
            self._rows: NDArray[np.float32] = recorded["rows"]
            self._fields = [str(name) for name in recorded["fields"]]

    def turn(self) -> None:
        if self.ended or self._air.clock_s < self._due_s:
            return
        now = self._air.now()
        first_s = now.wall_us / 1e6 - self._n * self._step_s
        picked = np.arange(self._at, self._at + self._n) % len(self._rows)
        columns = {name: self._rows[picked, i].tolist() for i, name in enumerate(self._fields)}
        times = [first_s + i * self._step_s for i in range(self._n)]
        line = msgspec.json.encode({"stream": STREAM, "columns": {"t": times, **columns}})
        self._lines, self._at = self._lines + 1, self._at + self._n
        self._due_s += self._commit_s
        for taken in self._reader.parse([line], self._lines, now.wall_us):
            for number, reason in taken.rejected.items():
                self._group.reject(self, number, reason)
            if taken.validated is not None:
                self._group.add_rows(self, taken.stream, taken.validated, taken.lines, now)
        self._group.advance(self, self._lines)
        self.accepted += self._group.commit(now)[self].accepted
