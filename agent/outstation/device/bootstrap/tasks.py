"""Composition root of tasks: from a task's config to a loaded task, with what the store remembers of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from outstation.device import config
from outstation.device.batch_parts import drift_state
from outstation.device.batch_parts.drift_state import RestoredDrift
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.bootstrap.assembly import assemble_task
from outstation.device.bundles import history, quarantine, rollout_state
from outstation.device.bundles.quarantine import CrashMarker
from outstation.device.config import Config
from outstation.device.machine.timekeeping import make_clock
from outstation.device.pipeline import tuning_cache
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.rollout import transitions
from outstation.device.rules import compiler
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation import media
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import ConfigError
from outstation.ml.drift.monitor import DriftMonitor
from outstation.ml.drift.monitor_settings import MonitorSettings
from outstation.ml.model import activation
from outstation.ml.model.activation import LoadedBundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.bundle.manifest import Manifest
from outstation.ml.model.inference import scores
from outstation.ml.model.inference.tuning import Tuning
from outstation.ml.model.sandbox.confinement import ModelPolicy
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel
from outstation.protocol.wire import keys
from outstation.protocol.wire.keys import PublicKey

if TYPE_CHECKING:
    from outstation.device.batch_parts.joined_streams import JoinedStream

# Signature of `activation.activate`; a simulation shares the models of many devices.
Activate = Callable[..., LoadedBundle]


def parse_public_keys(file: Path, key: str, texts: list[str]) -> list[PublicKey]:
    """Parse public keys of the config. Raises ConfigError."""
    try:
        return [keys.parse_public_key(text) for text in texts]
    except ValueError as error:
        raise ConfigError(
            str(file), key, f"not a base64url Ed25519 public key: {error}; copy the 43 characters of a .pub file"
        ) from None


def trusted_publishers(file: Path, conf: Config, store: Store | None) -> list[PublicKey]:
    """Return the keys whose installed bundles this device runs, besides those of built-in bundles.

    A bundle that an operator's key signed before it was revoked keeps running.
    """
    listed = parse_public_keys(file, "publishers.keys", conf.publishers.keys)
    operators = parse_public_keys(file, "operators.keys", conf.operators.keys)
    if store is None or conf.updates is None:
        return [*listed, *operators]
    from outstation.device.machine.trusted_keys import load_operators

    return [*listed, *operators, *load_operators(store, Path(conf.updates.root))]


def model_policy(conf: Config) -> ModelPolicy:
    """Return the site's rules for models."""
    memory = conf.models.memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return ModelPolicy(conf.models.confinement, max(64, int(memory) >> 20))


def open_crash_marker(conf: Config, store: Store, writer: MessageLog) -> CrashMarker:
    """Open the crash marker and handle the crash that it shows; once a start, before tasks are loaded."""
    marker, now = CrashMarker(conf.data_dir), make_clock(store)()
    if not transitions.roll_back_after_crash(conf, store, writer, marker, now):
        quarantine.handle_crash(conf, store, writer, marker, now)
    return marker


def load_task(
    file: Path,
    conf: Config,
    store: Store | None,
    name: str,
    path: Path | None = None,
    *,
    marker: CrashMarker | None = None,
    known_tunings: Sequence[Tuning] = (),
    on_wait: Callable[[], None] = lambda: None,
    activate: Activate = activation.activate,
) -> LoadedTask:
    """Verify, probe and load a task's bundle, or the one at `path`. Raises ConfigError, BadBundle.

    With a `store`, the tuning comes from there and is saved there; otherwise it comes from `known_tunings`. `on_wait`
    is called about once a second while its model process works.
    """
    if path is None:
        path = history.locate_bundle(conf, store, name)
        if store is not None:
            quarantine.require_not_quarantined(store, name, path)

    def guard_run(loaded_bundle: Bundle) -> AbstractContextManager[object]:
        return nullcontext() if marker is None else marker.guard_run(name, loaded_bundle.digest)

    if store is not None:
        # Tasks of one bundle are probed and tuned once, and share its process.
        others = (other for other in conf.tasks if other != name)
        known_tunings = [tuning for task in (name, *others) for tuning in tuning_cache.load(store, task)]
    active = activate(
        path, trusted_publishers(file, conf, store), known_tunings, guard_run, model_policy(conf), on_wait
    )
    if store and active.tuning:
        tuning_cache.save(store, name, active.tuning)
    return build_task(file, conf, store, name, active, guard_run)


def build_task(
    file: Path,
    conf: Config,
    store: Store | None,
    name: str,
    active: LoadedBundle,
    guard_run: Callable[[Bundle], AbstractContextManager[object]],
) -> LoadedTask:
    """Build the task of a loaded bundle, with its state from the `store`. Raises ConfigError."""
    task = conf.tasks[name]
    check_fields(file, conf, name, active.bundle)
    monitor = _build_drift_monitor(str(file), conf, name, active)
    restored = None if monitor is None else RestoredDrift(monitor, monitor.start())
    if monitor is not None and store is not None:
        # While another bundle runs as a canary, the drift state of this one is saved elsewhere.
        has_other_canary = rollout_state.find_canary_digest(store, name) not in ("", active.bundle.digest)
        restored = drift_state.restore(store, name, monitor, task_keys.SAVED_SUFFIX if has_other_canary else "")
    rules = compiler.compile_rules(str(file), name, task.alerts, active.bundle.manifest, active.model)
    sampled, joined_streams = None, _select_joined_streams(conf, name, active.bundle.manifest)
    if conf.samples is not None and conf.samples.covers(name):
        from outstation.device.samples.selection import SampledTask

        fields = conf.streams[task.stream].fields
        joined = {key: (each.name, each.config.fields) for key, each in joined_streams.items()}
        sampled = SampledTask.from_bundle(conf.samples, (name, task.stream), fields, active.bundle, joined)
    plan = TaskPlan.from_bundle(
        *(name, task, conf.streams[task.stream], active.bundle, active.model, config.digest(conf)),
        keep_results=conf.buffer.keep_results > 0,
        tuning=active.tuning,
    )
    return assemble_task(
        plan,
        restored,
        # A model in a process of its own cannot end this one.
        crash_guard=nullcontext if isinstance(active.model, SubprocessModel) else partial(guard_run, active.bundle),
        rules=rules,
        samples=sampled,
        joined_streams=joined_streams,
        is_crash_suspect=store is not None and quarantine.is_suspected(store, name, active.bundle.digest),
    )


def check_fields(file: Path, conf: Config, name: str, loaded_bundle: Bundle) -> None:
    """Check that the task's stream and alert rules fit its bundle. Raises ConfigError."""
    stream = conf.tasks[name].stream
    _check_media_format(file, conf, name, loaded_bundle.manifest)
    _check_joined_streams(file, conf, name, loaded_bundle.manifest)
    compiler.compile_rules(str(file), name, conf.tasks[name].alerts, loaded_bundle.manifest)
    numeric = {f.name for f in conf.streams[stream].fields if f.type != "category"}
    for field in loaded_bundle.manifest.input.fields:
        if field not in numeric:
            raise ConfigError(
                str(file),
                f"tasks.{name}.stream",
                f"bundle {loaded_bundle.manifest.name} needs numeric field {field!r}, stream {stream!r} has none"
                f"{did_you_mean(field, numeric)}",
            )


def _select_joined_streams(conf: Config, name: str, manifest: Manifest) -> dict[str, JoinedStream]:
    """Return the stream of each further input; without one in the config it is the task's own."""
    if not manifest.joined:
        return {}
    from outstation.device.batch_parts.joined_streams import JoinedStream

    task = conf.tasks[name]
    own = config.JoinedStreamConfig(stream=task.stream)
    chosen = {joined: task.inputs.get(joined, own) for joined in manifest.joined}
    return {
        joined: JoinedStream(source.stream, conf.streams[source.stream], float(source.wait))
        for joined, source in chosen.items()
    }


def _check_joined_streams(file: Path, conf: Config, name: str, manifest: Manifest) -> None:
    """Check that the streams of further inputs have their fields. Raises ConfigError."""
    task = conf.tasks[name]
    if unknown := [joined for joined in task.inputs if joined not in manifest.joined]:
        hint = did_you_mean(unknown[0], manifest.joined, "it has none")
        problem = f"bundle {manifest.name} has no such further input{hint}"
        raise ConfigError(str(file), f"tasks.{name}.inputs.{unknown[0]}", problem)
    for joined, source in _select_joined_streams(conf, name, manifest).items():
        numeric = {f.name for f in source.config.fields if f.type != "category"}
        for field in manifest.joined[joined].fields:
            if field not in numeric:
                raise ConfigError(
                    str(file),
                    f"tasks.{name}.inputs",
                    f"input {joined!r} of bundle {manifest.name} needs numeric field {field!r}, stream "
                    f'{source.name!r} has none; name its stream: inputs = {{ {joined} = {{ stream = "…" }} }}',
                )


def _check_media_format(file: Path, conf: Config, name: str, manifest: Manifest) -> None:
    """Check that rows of images and sounds are made like those the bundle was packed with. Raises ConfigError."""
    stream, wanted = conf.tasks[name].stream, manifest.input.image or manifest.input.sound
    configured, fields = conf.streams[stream].media_format, {f.name for f in conf.streams[stream].fields}
    if wanted is None or configured == wanted or (configured is None and fields.issuperset(manifest.input.fields)):
        return
    source = f'source = {{ kind = "files", folder = "…", {media.to_toml(wanted)} }}'
    raise ConfigError(
        str(file),
        f"tasks.{name}.stream",
        f"bundle {manifest.name} needs rows that stream {stream!r} does not make; configure a stream with {source}",
    )


def _build_drift_monitor(file: str, conf: Config, name: str, active: LoadedBundle) -> DriftMonitor | None:
    if active.reference is None:
        return None
    task, manifest = conf.tasks[name], active.bundle.manifest
    key, declared, stream = f"tasks.{name}.class_field", manifest.drift.class_field or "", conf.streams[task.stream]
    if task.class_field and manifest.output.labels:
        raise ConfigError(
            file, key, f"bundle {manifest.name} names classes itself, so `class_field` has no use: remove it"
        )
    if task.class_field is None and declared:
        # The config's own was checked when it was read.
        key += f' (as bundle {manifest.name} says; class_field = "" for none)'
        config.check_class_field(file, key, declared, stream)
    return DriftMonitor(
        MonitorSettings(
            active.reference,
            labels=manifest.output.labels,
            window=manifest.drift.window,
            learn_windows=task.learn_windows,
            min_learn_s=float(task.learn_duration),
            learn_extension=task.learn_extension,
            seasonality=task.seasonality or manifest.drift.seasonality or "auto",
            units=manifest.input.units,
            roles=manifest.input.roles,
            class_field=declared if task.class_field is None else task.class_field,
            hold_deviating=task.on_deviation == "hold",
            further=scores.monitored_outputs(manifest),
        )
    )
