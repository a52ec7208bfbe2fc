"""Composition root of the daemon: every object that a running device consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from outstation.device import status
from outstation.device.bootstrap import device, rollout, sinks
from outstation.device.bootstrap.model_host import ModelHost
from outstation.device.bootstrap.tasks import Activate, load_task, open_crash_marker, parse_public_keys
from outstation.device.bundles import history, overrides, quarantine, rollout_state
from outstation.device.bundles.quarantine import CrashMarker
from outstation.device.capacity import space
from outstation.device.commands.actions import TaskActions
from outstation.device.commands.executor import CommandExecutor, RemoteCommands
from outstation.device.commands.key_rotation import KeyRotation
from outstation.device.commands.receiver import CommandReceiver
from outstation.device.commands.wipe import Wipe
from outstation.device.config import Config
from outstation.device.config.sources import SOURCES
from outstation.device.daemon import Daemon, Notifier, ReadingSender
from outstation.device.health import BundleFailure
from outstation.device.intake.restarted_source import RestartedSource
from outstation.device.intake.server import Intake
from outstation.device.intake.source import Source, SourceContext, load_source_module
from outstation.device.machine import certificate, secret_file
from outstation.device.machine.timekeeping import make_clock
from outstation.device.machine.trusted_keys import TrustedKeys
from outstation.device.pipeline import labelled_output
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.pipeline.tasks import Effect, Runtime, ScheduledTask
from outstation.device.rollout import saved_drift
from outstation.device.rollout.desired_state import DesiredStateStore
from outstation.device.rollout.fetch.request import METADATA_DIR
from outstation.device.rollout.updater import BundleUpdater
from outstation.device.rules import rule_store
from outstation.device.signals import Signals
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.uplink.sink import OpenSink
from outstation.device.uplink.uplink import Uplink
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import BadBundle, ConfigError
from outstation.integrations.notify.config import DATABASE
from outstation.ml.model import activation
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import PublicKey
from outstation.protocol.wire.trust import COLLECTOR, DEPLOYER, OPERATOR, REPORTER


def load_scheduled_tasks(
    file: Path,
    conf: Config,
    store: Store,
    marker: CrashMarker | None = None,
    on_wait: Callable[[], None] = lambda: None,
    activate: Activate = activation.activate,
) -> tuple[list[ScheduledTask], list[BundleFailure]]:
    """Load all tasks; return those that run, and the failures of bundles that do not. Raises ConfigError.

    A bundle that fails is replaced by the newest one that ran for its task, if there is one. It stops no other task.
    """
    schedules = {}
    for name in conf.tasks:
        last_run = int(store.load_state(name, task_keys.LAST_RUN) or 0) or None
        schedules[name] = overrides.effective_schedule(str(file), conf, store, name, last_run)
    scheduled, failures = [], []
    for name, task in conf.tasks.items():
        loaded: LoadedTask | None
        try:
            loaded = load_task(file, conf, store, name, marker=marker, on_wait=on_wait, activate=activate)
        except BadBundle as problem:
            loaded = _load_previous(file, conf, store, name, marker, on_wait, activate)
            fallback = "" if loaded is None else str(history.bundle_ref(loaded.bundle))
            failures.append(BundleFailure(name, task.bundle, str(problem), fallback))
        if loaded is not None:
            scheduled.append(ScheduledTask(loaded, schedules[name], overrides.is_paused(store, name)))
    return scheduled, failures


def _load_previous(
    file: Path,
    conf: Config,
    store: Store,
    name: str,
    marker: CrashMarker | None,
    on_wait: Callable[[], None],
    activate: Activate,
) -> LoadedTask | None:
    """Load the task with the newest bundle that ran for it before and still loads."""
    excluded = {history.configured_digest(conf.tasks[name].bundle, conf.data_dir)}
    excluded |= set(overrides.load_quarantined(store, name))
    for ref in history.available_bundles(store, name, conf.data_dir, excluded):
        with suppress(BadBundle, ConfigError):
            folder = history.copy_folder(conf.data_dir, ref.digest)
            return load_task(file, conf, store, name, folder, marker=marker, on_wait=on_wait, activate=activate)
    return None


def build_sources(file: Path, conf: Config, store: Store) -> list[Source]:
    sources: list[Source] = []
    for name, stream in conf.streams.items():
        context = SourceContext(str(file), conf, name)
        if (module := load_source_module(context)) is None:
            continue
        build = partial(module.build, context, stream.source, store)
        sources.append(build() if SOURCES.is_shipped(stream.source.kind) else RestartedSource(name, build, store))
    return sources


def _record_bundles(
    conf: Config, store: Store, message_log: MessageLog, scheduled: Sequence[ScheduledTask], now: ClockReading
) -> None:
    """Record the bundles that this start activated, release quarantined ones, and delete copies of no use."""
    for loaded in (entry.task for entry in scheduled):
        if not rollout_state.find_canary_digest(store, loaded.name):
            history.record_configured(store, message_log, loaded.name, loaded.bundle, conf.data_dir, now)
            saved_drift.end_unreferenced(loaded, store, message_log, now)
    quarantine.release_reconfigured(conf, store, message_log, now)
    history.prune(store, conf.tasks, conf.data_dir)


def _open_trusted_keys(
    file: Path,
    conf: Config,
    store: Store,
    message_log: MessageLog,
    now: Callable[[], ClockReading],
) -> TrustedKeys:
    """Open the keys that the config names, or the trust document in force. Raises ConfigError."""
    sinks.find_encryption_key(file, conf)
    collector = parse_public_keys(file, "collector.key", [conf.collector.key])[0] if conf.collector.key else None
    if collector is None and conf.collector.delivery == "collector":
        raise ConfigError(
            str(file), "collector.key", 'empty: without it no acknowledgement counts; set it, or delivery = "broker"'
        )
    configured = [] if collector is None else [Signer(COLLECTOR, collector)]
    for role, name in ((REPORTER, "reporters"), (DEPLOYER, "deployers"), (OPERATOR, "keys")):
        texts = getattr(conf.operators, name)
        configured += [Signer(role, key) for key in parse_public_keys(file, f"operators.{name}", texts)]
    anchor_file = None if conf.updates is None else Path(conf.updates.root)
    return TrustedKeys(store, message_log, now, configured, anchor_file, conf.data_dir / METADATA_DIR)


def _build_commands(
    file: Path,
    conf: Config,
    store: Store,
    message_log: MessageLog,
    trusted: TrustedKeys,
    receiver: CommandReceiver,
    load: Callable[..., LoadedTask],
    runtime: Runtime,
    updater: BundleUpdater,
) -> RemoteCommands:
    key_files, key_path = device.load_key_files(file, conf), device.device_key_path(file, conf)
    rotation = KeyRotation(store, message_log, key_files, receiver.post, runtime.reconnect)
    wipe = Wipe(store, message_log, trusted, runtime.halt, conf.operators.wipe_delay)
    tasks = TaskActions(
        *(str(file), conf, store, message_log, runtime),
        load,
        lambda: status.limit_status(status.build_document(conf, store), message_log),
        updater.rollouts,
    )

    def install_certificate(args: Mapping[str, str], _: ClockReading) -> Effect:
        end = certificate.install_certificate(conf, args["certificate"])
        # The session continues; the next connection uses it.
        return Effect(f"The TLS certificate is valid until {end:%Y-%m-%d}.", {"end": f"{end:%Y-%m-%dT%H:%M:%SZ}"})

    actions = {**tasks.by_name(), "rotate-key": rotation.rotate, "cancel-wipe": wipe.cancel}
    actions["install-certificate"] = install_certificate
    executor = CommandExecutor(store, message_log, receiver, actions, {"wipe": wipe.request})
    return RemoteCommands(executor, receiver, rotation, wipe, partial(device.erase, file, conf, key_path))


def _seal_if_encrypted(file: Path, conf: Config, trusted: TrustedKeys, open_sink: OpenSink) -> OpenSink:
    if conf.privacy.encrypt:
        return sinks.seal_to_collector(file, conf, open_sink, trusted.find_encryption_key)
    return open_sink


def _list_publishers(file: Path, conf: Config, trusted: TrustedKeys) -> Callable[[], list[PublicKey]]:
    """Return a function that lists the keys that may sign bundles now. Raises ConfigError."""
    configured = parse_public_keys(file, "publishers.keys", conf.publishers.keys)
    return lambda: [*configured, *(signer.key for signer in trusted.commanders if signer.owner == OPERATOR)]


def build_daemon(
    file: Path,
    conf: Config,
    store: Store,
    *,
    now: Callable[[], ClockReading] | None = None,
    open_sink: OpenSink | None = None,
    pause: Callable[[float], object] | None = None,
    host: ModelHost | None = None,
) -> Daemon:
    """Build the daemon. A simulation gives its own clock, sink and models. Raises UsageError, ConfigError."""
    host = host or ModelHost()
    message_log = device.open_message_log(file, conf, store)
    now = now or make_clock(store)
    trusted = _open_trusted_keys(file, conf, store, message_log, now)
    receiver = CommandReceiver(store, message_log, trusted)
    desired_states = DesiredStateStore(store, message_log, trusted, conf.device.groups)
    trusted.on_change = desired_states.verify_again
    marker = open_crash_marker(conf, store, message_log)
    rule_store.reconcile(store, message_log, conf.tasks, now())
    signals = Signals()

    def on_model_wait() -> None:
        signals.on_model_wait()

    scheduled, failures = load_scheduled_tasks(file, conf, store, marker, on_model_wait, host.activate)
    _record_bundles(conf, store, message_log, scheduled, now())

    def on_rows_committed() -> None:
        # At a steady pace rows would wake the main loop for nothing. Where space is short, that loop makes room.
        if any(entry.schedule.counts_rows for entry in scheduled) or space.is_short(store):
            signals.wake()

    intake = Intake(
        *(conf, store, build_sources(file, conf, store), now, on_rows_committed, signals.fail),
        lambda: labelled_output.build_label_targets([entry.task for entry in scheduled]),
        secret_file.LABEL_KEY.load_or_create(conf.data_dir),
    )
    uplink = Uplink(
        *(conf, store, message_log, trusted.find_collector, now, signals.fail),
        _seal_if_encrypted(file, conf, trusted, open_sink or sinks.sink_opener(file, conf)),
        receivers=[trusted, receiver, desired_states],
        pause=pause,
    )
    load = partial(load_task, file, conf, store, marker=marker, on_wait=on_model_wait, activate=host.activate)
    make_updater = partial(
        rollout.build_updater,
        *(file, conf, store, message_log, desired_states, _list_publishers(file, conf, trusted)),
        *(marker, host, signals.wake),
    )
    make_commands = partial(_build_commands, file, conf, store, message_log, trusted, receiver, load)
    return Daemon(
        *(conf, store, message_log, scheduled, failures, intake, uplink),
        *(make_updater, make_commands, load, signals, now),
        _build_notifier(conf, store, message_log, now),
        _build_sampler(file, conf, store, message_log, trusted),
    )


def _build_sampler(
    file: Path, conf: Config, store: Store, message_log: MessageLog, trusted: TrustedKeys
) -> ReadingSender | None:
    """Build what sends readings, if the owner consents. Raises ConfigError without a key to seal them to."""
    if conf.samples is None:
        return None
    # Its cryptography costs memory that a device without it keeps.
    from outstation.device.samples.sampler import Sampler

    configured = sinks.load_encryption_key(file, conf, "[samples] seals readings")
    return Sampler(store, message_log, partial(trusted.find_encryption_key, configured))


def _build_notifier(
    conf: Config, store: Store, message_log: MessageLog, now: Callable[[], ClockReading]
) -> Notifier | None:
    # A file without targets is left from an earlier config.
    if not conf.notify.is_on and not (conf.data_dir / DATABASE).exists():
        return None
    # Its parts cost memory that a device without it keeps.
    from outstation.device.bootstrap import notifier

    return notifier.build(conf, store, message_log, now)
