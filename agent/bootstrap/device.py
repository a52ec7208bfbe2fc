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
from agent.bootstrap.tasks import load_task, open_crash_marker, parse_public_keys, trusted_publishers
from agent.clock import ClockReading
from agent.config import Config, FilesSource, HostSource, MqttSource, ReplaySource
from agent.device.bundles import history, overrides, quarantine, rollout_state
from agent.device.bundles.crash_marker import CrashMarker
from agent.device.commands.operations import RemoteCommands
from agent.device.commands.receiver import CommandReceiver
from agent.device.daemon import Daemon
from agent.device.health import BundleFailure
from agent.device.intake.server import Intake, Source
from agent.device.machine.timekeeping import make_clock
from agent.device.pipeline import label_metrics
from agent.device.pipeline.batch import LoadedTask
from agent.device.pipeline.tasks import Runtime, ScheduledTask
from agent.device.rollout.desired_state import DesiredStateStore
from agent.device.rollout.updater import BundleUpdater
from agent.device.store import task_keys
from agent.device.store.store import Store
from agent.device.uplink.uplink import Uplink
from agent.errors import BadBundle, ConfigError


def load_scheduled_tasks(
    file: Path, conf: Config, store: Store, marker: CrashMarker | None = None
) -> tuple[list[ScheduledTask], list[BundleFailure]]:
    """All tasks, loaded, and those whose bundle does not run here: these stop nothing else. Raises ConfigError.

    In place of such a bundle goes on what ran for the task before.
    """
    schedules = {}
    for name in conf.tasks:
        last_run = int(store.load_state(name, task_keys.LAST_RUN) or 0) or None
        schedules[name] = overrides.effective_schedule(str(file), conf, store, name, last_run)
    good, broken = [], []
    for name, task in conf.tasks.items():
        loaded: LoadedTask | None
        try:
            loaded = load_task(file, conf, store, name, marker=marker)
        except BadBundle as problem:
            loaded = _load_previous_bundle(file, conf, store, name, marker)
            instead = "" if loaded is None else str(history.bundle_ref(loaded.bundle))
            broken.append(BundleFailure(name, task.bundle, str(problem), instead))
        if loaded is not None:
            good.append(ScheduledTask(loaded, schedules[name], overrides.is_paused(store, name)))
    return good, broken


def _load_previous_bundle(
    file: Path, conf: Config, store: Store, name: str, marker: CrashMarker | None
) -> LoadedTask | None:
    """The task with the newest bundle that ran for it and still does."""
    refused = history.configured_digest(conf.tasks[name].bundle, conf.data_dir)
    for one in history.available_bundles(
        store, name, conf.data_dir, {refused, *overrides.load_quarantined(store, name)}
    ):
        with suppress(BadBundle, ConfigError):
            return load_task(file, conf, store, name, history.copy_folder(conf.data_dir, one.digest), marker=marker)
    return None


def build_sources(file: Path, conf: Config, store: Store) -> list[Source]:
    """The sources this device runs itself."""
    found: list[Source] = []
    for name, stream in conf.streams.items():
        source = stream.source
        if isinstance(source, FilesSource):
            from agent.device.intake import media_reader
            from agent.device.intake.sources.files import FolderWatcher

            media_reader.check_config(str(file), name, stream, int(conf.buffer.max_size))
            found.append(FolderWatcher(name, stream, source, store))
        elif isinstance(source, HostSource):
            from agent.device.intake.sources.host import HostMetrics

            found.append(HostMetrics(str(file), name, stream, source, conf.data_dir))
        elif isinstance(source, MqttSource):
            from agent.device.intake.sources.mqtt import MqttSubscriber

            found.append(MqttSubscriber(str(file), name, stream, source, f"{conf.device.id}-{name}"))
        elif isinstance(source, ReplaySource):
            from agent.device.intake.sources.replay import ReplayPlayer

            found.append(ReplayPlayer(name, stream, source, store, clock.read()))
    return found


def build_daemon(
    file: Path, conf: Config, store: Store, *, now: Callable[[], ClockReading] | None = None, **uplink_options: Any
) -> Daemon:
    """The whole device; another clock and another link, as `Uplink` takes them, for simulations. Raises UsageError."""
    writer = wiring.open_message_log(file, conf, store)
    now = now or make_clock(store)
    collector = parse_public_keys(file, "collector.key", [conf.collector.key])[0] if conf.collector.key else None
    if collector is None and conf.collector.delivery == "collector":
        raise ConfigError(
            str(file), "collector.key", 'empty: without it no acknowledgement counts; set it, or delivery = "broker"'
        )
    operators = parse_public_keys(file, "operators.keys", conf.operators.keys)
    commands = CommandReceiver(store, writer, operators)
    desires = DesiredStateStore(store, writer, operators, conf.device.groups)
    marker = open_crash_marker(conf, store, writer)
    tasks, broken = load_scheduled_tasks(file, conf, store, marker)
    for one in tasks:
        if not rollout_state.find_canary_digest(store, one.task.name):
            history.record_configured(store, writer, one.task.name, one.task.bundle, conf.data_dir, now())
    quarantine.release_reconfigured(conf, store, writer, now())
    history.prune(store, conf.tasks, conf.data_dir)
    own = build_sources(file, conf, store)

    def make_intake(on_commit: Callable[[], None], on_failure: Callable[[Exception], None]) -> Intake:
        return Intake(
            conf,
            store,
            own,
            now,
            on_commit,
            on_failure,
            lambda: label_metrics.build_label_targets([one.task for one in tasks]),
        )

    def make_uplink(on_failure: Callable[[Exception], None]) -> Uplink:
        return Uplink(
            conf, store, writer, collector, now, on_failure, commands=commands, desired_states=desires, **uplink_options
        )

    def make_updating(machine: Runtime, wake: Callable[[], None], on_wait: Callable[[], None]) -> BundleUpdater:
        trusted = trusted_publishers(file, conf)
        return rollout.build_updater(file, conf, store, writer, desires, trusted, marker, machine, wake, on_wait)

    def make_operations(machine: Runtime, updates: BundleUpdater) -> RemoteCommands:
        files, given = wiring.load_key_files(file, conf), wiring.device_key_path(file, conf)
        load = partial(load_task, file, conf, store, marker=marker)
        rollouts = updates.rollouts
        return operating.build_operations(file, conf, store, writer, commands, files, given, load, machine, rollouts)

    return Daemon(conf, store, writer, tasks, broken, make_intake, make_uplink, make_updating, make_operations, now)
