"""Runner of a scenario: all devices and the collector in turn, at the moments of a virtual clock."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
import resource
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from outstation.device import health
from outstation.device.intake.sources.recordings import Playlist
from outstation.fleet.audit.audit import audit
from outstation.fleet.audit.audit_report import AuditReport
from outstation.fleet.collector.collector import Collector, client_id
from outstation.fleet.collector.encryption_keys import EncryptionKeys
from outstation.fleet.collector.subscriptions import topic_filters
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import enrol_on_this_machine, init_fleet
from outstation.foundation import durable_files
from outstation.foundation.errors import LinkDown
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.wire import keys
from outstation.workbench.testing.simulation.broker_air import BrokerAir, FaultyLink
from outstation.workbench.testing.simulation.device import SimulatedDevice, Tally, sum_tallies
from outstation.workbench.testing.simulation.feed import Feed
from outstation.workbench.testing.simulation.label_source import LabelSource
from outstation.workbench.testing.simulation.lossy_link import LossyBroker, LossyLink
from outstation.workbench.testing.simulation.machine import MachineRoom
from outstation.workbench.testing.simulation.operator import FOLLOW_S, Operator
from outstation.workbench.testing.simulation.pace import Pace
from outstation.workbench.testing.simulation.scenario import (
    AnyEvent,
    BadNetwork,
    CollectorOutage,
    FullDisk,
    Outage,
    PowerCut,
    Rollout,
    Scenario,
    SensorFault,
    Silence,
    SkewedClock,
)
from outstation.workbench.testing.simulation.setup import Setup
from outstation.workbench.testing.simulation.shared_models import SharedModels

_FLEET = "sim"
_COLLECTOR = "collector"
# No machine of the fleet is the broker's.
_BROKER = BrokerConfig(url="mqtt://127.0.0.1:1")
_SESSION_S = 7 * 86_400
# A link without anything to receive, and the collector, get a turn this often.
_IDLE_S, _COLLECT_S = 5.0, 1.0
_PROGRESS_S = 0.5
# Seconds of real time between looks at a real broker's links.
_POLL_S = 0.05
# Descriptors of a device's files, and of everything else.
_DEVICE_FILES, _OTHER_FILES = 8, 200
# Called with the simulated seconds so far and in all, and the messages published.
Progress = Callable[[int, int, int], None]


class Injected(msgspec.Struct, frozen=True):
    """An event of the scenario, and the devices at which it happened; `unseen`: those that had sent nothing before."""

    event: AnyEvent
    devices: list[str]
    unseen: list[str] = []


class Outcome(msgspec.Struct, frozen=True):
    """Outcome of a run: injected events, messages with their digest, rows, audit, seconds and peak memory.

    `rows`, `fields`: by stream; `labels`: by task; `task_streams`: streams that each task reads; `class_tasks`:
    those whose model names classes; `commit_s`: seconds between commits of rows; `health_s`: seconds between health
    messages of a device; `rollouts`: names of the roll-outs, and `refusals`: why one did not start, each by the plan
    file.
    """

    injected: list[Injected]
    devices: list[str]
    fields: dict[str, list[str]]
    task_streams: dict[str, list[str]]
    class_tasks: list[str]
    commit_s: float
    health_s: float
    messages: int
    digest: str
    rows: dict[str, Tally]
    labels: dict[str, Tally]
    undelivered: list[str]
    audit: AuditReport
    rollouts: dict[str, str]
    refusals: dict[str, str]
    simulated_s: float
    real_s: float
    peak_bytes: int


class Simulation:
    """A fleet in `folder`. `run` it once; the caller closes it. `progress` may raise to end the run between two turns.

    `broker`: URL of a real broker, which needs a `speed`; None: one in memory. `speed`: simulated seconds in a second;
    None: as fast as it goes.
    """

    def __init__(
        self, folder: Path, scenario: Scenario, setup: Setup, *, broker: str | None = None, speed: float | None = None
    ) -> None:
        self.folder, self.home, self._scenario, self._setup = folder, folder / "fleet", scenario, setup
        self.progress: Progress = lambda *_: None
        self.room = MachineRoom(scenario.seed, scenario.start_us, is_repeatable=broker is None)
        # Apart from keys and ids, of which another version may draw more.
        self._starts = random.Random(f"starts/{scenario.seed}")
        self._pace = None if speed is None else Pace(speed)
        # Nobody's messages of an earlier run, which a real broker may retain.
        self._fleet = _FLEET if broker is None else f"{_FLEET}-{secrets.token_hex(4)}"
        self._broker = _BROKER if broker is None else BrokerConfig(url=broker)
        self.air: Any = (LossyBroker if broker is None else BrokerAir)(scenario.seed, scenario.network)
        self.air.on_due = self._on_due
        self.devices: dict[str, SimulatedDevice] = {}
        self.messages = 0
        self._digest = hashlib.sha256()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._start_s: dict[str, float] = {}
        # Turn of a machine, with its name → when it is due.
        self._due: dict[tuple[Any, ...], float] = {}
        self._models = SharedModels()
        self._operator: Operator | None = None
        self._names = scenario.device_names()
        self._labels = LabelSource(scenario, setup)
        self._store: FleetStore | None = None
        self._collector: Collector | None = None
        self._collector_link: LossyLink | FaultyLink | None = None
        self._condition: Callable[[], bool] = lambda: False
        self._is_met = False
        self._report_s = self._began_s = self._poll_s = 0.0
        _raise_file_limit(len(self._names))

    def close(self) -> None:
        for device in self.devices.values():
            device.close()
        self._models.close()
        if isinstance(self.air, BrokerAir):
            self.air.close()
        if self._store is not None:
            self._store.close()
            self._store = None

    @property
    def store(self) -> FleetStore:
        assert self._store is not None
        return self._store

    @property
    def database(self) -> Path:
        return self.home / "fleet.db"

    @property
    def now_s(self) -> float:
        """Simulated seconds since the start."""
        return self.room.now_s

    def run(self) -> Outcome:
        """Run the scenario and audit what the collector stored. Raises OutstationError."""
        self.start()
        self.advance(self._scenario.duration)
        return self.finish()

    def start(self) -> None:
        """Create the fleet; its devices start as time passes. Raises OutstationError."""
        self._began_s = time.monotonic()
        with self.room.installed():
            self._prepare()

    def advance(self, seconds: float, condition: Callable[[], bool] = lambda: False) -> bool:
        """Let simulated time pass, at most until `condition` is true after a turn of the collector; return it."""
        with self.room.installed():
            self._condition, self._is_met = condition, False
            try:
                self._advance(self.room.now_s + seconds)
            finally:
                self._condition = lambda: False
            return self._is_met

    def finish(self) -> Outcome:
        """End the feeds, wait until everything is acknowledged, and audit."""
        with self.room.installed():
            for device in self.devices.values():
                device.stop_feeds()
            undelivered = self._drain()
            assert self._operator is not None
            report = audit(self.store, operators=self._operator.public_keys)
        return Outcome(
            injected=[self._describe_event(event) for event in self._scenario.events],
            devices=[*self._names],
            fields=self._setup.fields,
            task_streams=self._setup.task_streams,
            class_tasks=self._setup.class_tasks,
            commit_s=float(self._setup.config.buffer.commit_every),
            health_s=health.interval_s(self._setup.config),
            messages=self.messages,
            digest=f"sha256:{self._digest.hexdigest()}",
            rows=sum_tallies(device.rows for device in self.devices.values()),
            labels=sum_tallies(device.labels for device in self.devices.values()),
            undelivered=undelivered,
            audit=report,
            rollouts={file: prepared.plan.name for file, prepared in self._operator.prepared.items()},
            refusals=self._operator.refusals,
            simulated_s=self.room.now_s,
            real_s=time.monotonic() - self._began_s,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    def _describe_event(self, event: AnyEvent) -> Injected:
        names = self._scenario.select(event, self._names)
        return Injected(event, names, [name for name in names if self._start_s[name] >= event.at])

    # --- preparation ---

    def _prepare(self) -> None:
        """Create fleet, collector and devices, and queue when they start and what happens to them."""
        fleet = init_fleet(self.home, self._fleet, self._broker)
        self._store = store = FleetStore(self.database)
        key = keys.load_private(self.home / "collector.key")
        self._collector = Collector(self._fleet, self._broker, store, key, encryption_keys=EncryptionKeys(self.home))
        self._operator = Operator(self.home, fleet, store, self.air, self._broker)
        for event in self._scenario.events:
            if isinstance(event, Rollout):
                self._operator.prepare(event, self._scenario.select(event, self._names))
        for number, (name, group) in enumerate(self._names.items()):
            home = enrol_on_this_machine(self.home, fleet, store, name, self.folder / "devices" / name)
            file = home / "outstation.toml"
            durable_files.write(file, self._setup.device_toml(file.read_text(encoding="utf-8"), group).encode(), 0o600)
            start_s = self._starts.uniform(0.0, float(self._scenario.groups[group].start_within))
            feeds = self._make_feeds(name, number, start_s)
            self.devices[name] = SimulatedDevice(
                *(name, home, self.room, self.air, feeds, self._models, partial(self._labels.find, name))
            )
            self._start_s[name] = start_s
            self._at(start_s, partial(self._start, name))
            self._report_progress()
        for event in self._scenario.events:
            self._at(event.at, partial(self._apply, event, begins=True))
            if event.lasts is not None:
                self._at(event.end_s, partial(self._apply, event, begins=False))
        self._schedule(0.0, self._turn_collector)

    def _make_feeds(self, name: str, number: int, start_s: float) -> dict[str, Feed]:
        feeds = {}
        for stream, file in self._setup.recordings.items():
            subjects = file.subjects
            playlist = Playlist(
                file.recordings, subjects[number % len(subjects)], self._scenario.seed * 10_000 + number
            )
            fields = self._setup.fields[stream]
            faults = [
                event
                for event in self._scenario.events
                if isinstance(event, SensorFault)
                and event.stream in ("", stream)
                and {*event.fields} <= {*fields}
                and name in self._scenario.select(event, self._names)
            ]
            feeds[stream] = Feed(fields, file, playlist, start_s, faults)
        return feeds

    # --- the loop ---

    def _at(self, due_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (max(due_s, self.room.now_s), next(self._order), do))

    def _advance(self, until_s: float) -> None:
        """Run everything that is due up to a moment."""
        if self._pace is not None:
            self._pace.resume(self.room.now_s)
        while not self._is_met:
            due_s = self._queue[0][0] if self._queue else float("inf")
            if self._pace is not None and self._wait(min(due_s, until_s)):
                continue
            if due_s > until_s:
                break
            due_s, _, do = heapq.heappop(self._queue)
            self.room.now_s = self.air.clock_s = due_s
            do()
            self._record_published()
            self._report_progress()
        if not self._is_met:
            self.room.now_s = self.air.clock_s = until_s

    def _report_progress(self) -> None:
        if (now := time.monotonic()) >= self._report_s:
            self._report_s, now_s = now + _PROGRESS_S, self.room.now_s
            self.progress(round(now_s), round(max(self._scenario.duration, now_s)), self.messages)

    def _wait(self, due_s: float) -> bool:
        """Let real time pass, at most until `due_s`; return True if it is not over, or something came in."""
        assert self._pace is not None
        remaining_s = self._pace.remaining_s(due_s)
        reached_s = due_s - remaining_s * self._pace.speed
        self.room.now_s = self.air.clock_s = max(self.room.now_s, reached_s)
        if isinstance(self.air, BrokerAir):
            now = time.monotonic()
            if remaining_s or now >= self._poll_s:
                self._poll_s = now + _POLL_S
                self.air.poll(min(remaining_s, _POLL_S))
        elif remaining_s:
            time.sleep(min(remaining_s, _POLL_S))
        return remaining_s > 0

    def _drain(self) -> list[str]:
        """Run until each device once has everything acknowledged, at most as long as the scenario says.

        Return the devices that have not. All of many are never idle at a time: each sends a health message a minute.
        """
        self._is_met, waiting = False, self.devices
        end_s = self.room.now_s + self._scenario.drain
        while waiting and self.room.now_s < end_s:
            self._advance(min(end_s, self.room.now_s + _IDLE_S))
            waiting = {name: each for name, each in waiting.items() if each.is_on and each.has_unsent()}
        return [name for name, each in waiting.items() if each.is_on and each.has_unsent()]

    def _record_published(self) -> None:
        published = self.air.published
        for message in published:
            properties = (f"{name}={value}".encode() for name, value in message.properties)
            for part in (message.topic.encode(), message.payload, *properties):
                self._digest.update(len(part).to_bytes(4, "big") + part)
        self.messages += len(published)
        published.clear()

    def _start(self, name: str) -> None:
        device = self.devices[name]
        device.start()
        boot = device.machine.boot
        self._schedule(self.room.now_s, self._turn_daemon, name)
        self._schedule(self.room.now_s, self._turn_uplink, name)
        # Not all in the same moment: a real fleet does not, either.
        self._at(self.room.now_s + self._starts.random(), lambda: self._turn_feed(name, boot))

    def _turn_feed(self, name: str, boot: int) -> None:
        device = self.devices[name]
        if not device.is_on or device.machine.boot != boot:
            return
        device.commit_rows()
        if device.wants_tick:
            self._schedule(self.room.now_s, self._turn_daemon, name)
        self._at(self.room.now_s + device.commit_interval_s, lambda: self._turn_feed(name, boot))

    def _schedule(self, due_s: float, turn: Callable[..., None], *names: str) -> None:
        """Let a turn of a machine run at a moment, in place of a later one that was scheduled."""
        if due_s < self._due.get((turn, *names), float("inf")):
            self._due[turn, *names] = due_s
            self._at(due_s, lambda: self._run_turn(due_s, turn, *names))

    def _run_turn(self, due_s: float, turn: Callable[..., None], *names: str) -> None:
        if self._due.get((turn, *names)) == due_s:
            del self._due[turn, *names]
            turn(*names)

    def _turn_daemon(self, name: str) -> None:
        device = self.devices[name]
        if device.is_on:
            # At least a millisecond, so that a daemon with more to do lets the others run.
            self._schedule(self.room.now_s + max(0.001, device.tick()), self._turn_daemon, name)

    def _turn_uplink(self, name: str) -> None:
        device = self.devices[name]
        if device.is_on:
            wait_s = device.turn_uplink()
            self._schedule(self.room.now_s + (wait_s or _IDLE_S), self._turn_uplink, name)
            if device.wants_tick:
                self._schedule(self.room.now_s, self._turn_daemon, name)

    def _on_due(self, client: str, due_s: float) -> None:
        if client == _COLLECTOR:
            self._schedule(max(due_s, self.room.now_s + _COLLECT_S), self._turn_collector)
        elif client in self.devices and self.devices[client].is_connected:
            self._schedule(max(due_s, self.room.now_s), self._turn_uplink, client)

    def _turn_collector(self) -> None:
        assert self._collector is not None
        try:
            if self._collector_link is None:
                self._collector_link = self._connect_collector()
            self._collector.tick(self._collector_link, 0.0)
            # Also where no message came in: the collector's own alerts are about silence.
            self._is_met = self._is_met or self._condition()
        except LinkDown:
            self._collector.acknowledger.requeue_in_flight()
            self._collector_link = None
        self._schedule(self.room.now_s + _IDLE_S, self._turn_collector)

    def _connect_collector(self) -> Any:
        names = {} if isinstance(self.air, LossyBroker) else {"client_id": client_id(self._fleet, None)}
        subscribe = topic_filters(self._fleet)
        return self.air.connect(self._broker, _COLLECTOR, subscribe=subscribe, session_expiry_s=_SESSION_S, **names)

    def _start_rollout(self, event: Rollout) -> None:
        assert self._operator is not None
        names = self._scenario.select(event, self._names)
        self._operator.start(event, [self.devices[name].home for name in names])
        self._schedule(self.room.now_s, self._turn_operator)

    def _turn_operator(self) -> None:
        assert self._operator is not None
        if self._operator.follow():
            self._schedule(self.room.now_s + FOLLOW_S, self._turn_operator)

    # --- events ---

    def _apply(self, event: AnyEvent, *, begins: bool) -> None:
        """Begin or end an event. Those of sensors and labels are in the feeds."""
        if isinstance(event, CollectorOutage):
            self.air.set_offline(_COLLECTOR, is_offline=begins)
        if isinstance(event, Rollout):
            self._start_rollout(event)
            return
        for name in self._scenario.select(event, self._names):
            device = self.devices[name]
            match event:
                case Outage():
                    self.air.set_offline(name, is_offline=begins)
                case BadNetwork():
                    if begins:
                        self.air.client_conditions[name] = event.conditions
                    else:
                        self.air.client_conditions.pop(name, None)
                case SkewedClock():
                    device.machine.offset_us += event.offset_us if begins else -event.offset_us
                    device.machine.is_synced = event.synced or not begins
                case FullDisk():
                    device.set_disk_full(is_full=begins)
                case Silence():
                    streams = {event.stream} if event.stream else {*self._setup.recordings}
                    device.silenced = device.silenced | streams if begins else device.silenced - streams
                case PowerCut():
                    self._cut_power(name, event, begins=begins)

    def _cut_power(self, name: str, event: PowerCut, *, begins: bool) -> None:
        device = self.devices[name]
        if begins and device.is_on:
            device.cut_power()
            for turn in (self._turn_uplink, self._turn_daemon):
                self._due.pop((turn, name), None)
        if not device.is_on and (not begins or event.lasts is None):
            self._start(name)


def _raise_file_limit(devices: int) -> None:
    """Raise the limit of open files to the need of this number of devices, as far as the system allows it.

    It stays raised: the devices' files are open between the steps, too, and another simulation may still need it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = devices * _DEVICE_FILES + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
