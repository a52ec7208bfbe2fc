"""Where the whole daemon is put together, and with it what only the daemon needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from agent import clock
from agent.bootstrap import commands as operating
from agent.bootstrap import rollout, wiring
from agent.bootstrap.tasks import configured_keys, guard, load_task, publishers
from agent.clock import Now
from agent.config import Config, FilesSource, HostSource, MqttSource, ReplaySource
from agent.device.bundles import history, overrides, quarantine, rollout_state
from agent.device.bundles.crash_marker import Marker
from agent.device.commands.operations import Operations
from agent.device.commands.receiver import Commands
from agent.device.daemon import LAST_RUN, Daemon
from agent.device.health import Broken
from agent.device.intake.server import Intake, Source
from agent.device.machine.timekeeping import clock_of
from agent.device.pipeline import label_metrics
from agent.device.pipeline.batch import Task
from agent.device.pipeline.tasks import Machine, Planned
from agent.device.rollout.desired_state import Desires
from agent.device.rollout.updater import Updating
from agent.device.store.store import Store
from agent.device.uplink.uplink import Uplink
from agent.errors import BadBundle, ConfigError


def planned(file: Path, conf: Config, store: Store, marker: Marker | None = None) -> tuple[list[Planned], list[Broken]]:
    """All tasks, loaded, and those whose bundle does not run here: these stop nothing else. Raises ConfigError.

    In place of such a bundle goes on what ran for the task before.
    """
    schedules = {}
    for name in conf.tasks:
        last_run = int(store.state(name, LAST_RUN) or 0) or None
        schedules[name] = overrides.schedule_in_force(str(file), conf, store, name, last_run)
    good, broken = [], []
    for name, task in conf.tasks.items():
        loaded: Task | None
        try:
            loaded = load_task(file, conf, store, name, marker=marker)
        except BadBundle as problem:
            loaded = _before(file, conf, store, name, marker)
            instead = "" if loaded is None else str(history.ran(loaded.bundle))
            broken.append(Broken(name, task.bundle, str(problem), instead))
        if loaded is not None:
            good.append(Planned(loaded, schedules[name], overrides.is_paused(store, name)))
    return good, broken


def _before(file: Path, conf: Config, store: Store, name: str, marker: Marker | None) -> Task | None:
    """The task with the newest bundle that ran for it and still does."""
    refused = history.configured_digest(conf.tasks[name].bundle, conf.data_dir)
    for one in history.ran_before(store, name, conf.data_dir, {refused, *overrides.set_aside(store, name)}):
        with suppress(BadBundle, ConfigError):
            return load_task(file, conf, store, name, history.folder(conf.data_dir, one.digest), marker=marker)
    return None


def sources(file: Path, conf: Config, store: Store) -> list[Source]:
    """The sources this device runs itself."""
    found: list[Source] = []
    for name, stream in conf.streams.items():
        source = stream.source
        if isinstance(source, FilesSource):
            from agent.device.intake import media_reader
            from agent.device.intake.sources.files import Files

            media_reader.require(str(file), name, stream, int(conf.buffer.max_size))
            found.append(Files(name, stream, source, store))
        elif isinstance(source, HostSource):
            from agent.device.intake.sources.host import Host

            found.append(Host(str(file), name, stream, source, conf.data_dir))
        elif isinstance(source, MqttSource):
            from agent.device.intake.sources.mqtt import Mqtt

            found.append(Mqtt(str(file), name, stream, source, f"{conf.device.id}-{name}"))
        elif isinstance(source, ReplaySource):
            from agent.device.intake.sources.replay import Replay

            found.append(Replay(name, stream, source, store, clock.read()))
    return found


def daemon(file: Path, conf: Config, store: Store, *, now: Callable[[], Now] | None = None, **uplink: Any) -> Daemon:
    """The whole device; another clock and another link, as `Uplink` takes them, for simulations. Raises UsageError."""
    writer = wiring.author(file, conf, store)
    now = now or clock_of(store)
    collector = configured_keys(file, "collector.key", [conf.collector.key])[0] if conf.collector.key else None
    if collector is None and conf.collector.delivery == "collector":
        raise ConfigError(
            str(file), "collector.key", 'empty: without it no acknowledgement counts; set it, or delivery = "broker"'
        )
    operators = configured_keys(file, "operators.keys", conf.operators.keys)
    commands = Commands(store, writer, operators)
    desires = Desires(store, writer, operators, conf.device.groups)
    marker = guard(conf, store, writer)
    tasks, broken = planned(file, conf, store, marker)
    for one in tasks:
        if not rollout_state.on_probation(store, one.task.name):
            history.activated(store, writer, one.task.name, one.task.bundle, conf.data_dir, now())
    quarantine.lift(conf, store, writer, now())
    history.prune(store, conf.tasks, conf.data_dir)
    own = sources(file, conf, store)

    def make_intake(committed: Callable[[], None], failed: Callable[[Exception], None]) -> Intake:
        return Intake(
            conf, store, own, now, committed, failed, lambda: label_metrics.asked([one.task for one in tasks])
        )

    def make_uplink(failed: Callable[[Exception], None]) -> Uplink:
        return Uplink(conf, store, writer, collector, now, failed, commands=commands, desires=desires, **uplink)

    def make_updating(machine: Machine, wake: Callable[[], None], waiting: Callable[[], None]) -> Updating:
        trusted = publishers(file, conf)
        return rollout.updating(file, conf, store, writer, desires, trusted, marker, machine, wake, waiting)

    def make_operations(machine: Machine, updates: Updating) -> Operations:
        files, given = wiring.key_files(file, conf), wiring.given_key(file, conf)
        load = partial(load_task, file, conf, store, marker=marker)
        rollouts = updates.rollouts
        return operating.operations(file, conf, store, writer, commands, files, given, load, machine, rollouts)

    return Daemon(conf, store, writer, tasks, broken, make_intake, make_uplink, make_updating, make_operations, now)
