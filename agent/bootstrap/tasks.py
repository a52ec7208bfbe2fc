"""From a task's config to a task with its bundle loaded: what must fit together, and what the store remembers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from agent import config, media
from agent.config import Config
from agent.device.bundles import history, quarantine, rollout_state
from agent.device.bundles.crash_marker import Marker
from agent.device.machine.timekeeping import clock_of
from agent.device.pipeline import drift_state, tuning_cache
from agent.device.pipeline.batch import Task
from agent.device.pipeline.drift_state import Ended
from agent.device.rollout import probation, saved_drift
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.drift.monitor import Judge
from agent.drift.state import State
from agent.errors import ConfigError
from agent.model import activation
from agent.model.activation import Active
from agent.model.bundle.bundle import Bundle
from agent.model.bundle.manifest import Manifest
from agent.model.inference.tuning import Choice
from agent.toml_files import suggestion
from agent.wire import keys
from agent.wire.keys import PublicKey


def configured_keys(file: Path, key: str, texts: list[str]) -> list[PublicKey]:
    """Public keys of the config. Raises ConfigError."""
    try:
        return [keys.public_key(text) for text in texts]
    except ValueError as error:
        raise ConfigError(str(file), key, f"not a base64url Ed25519 public key: {error}") from None


def publishers(file: Path, conf: Config) -> list[PublicKey]:
    """Whose bundles this device runs, beside those that ship with the agent."""
    listed = configured_keys(file, "publishers.keys", conf.publishers.keys)
    return [*listed, *configured_keys(file, "operators.keys", conf.operators.keys)]


def guard(conf: Config, store: Store, writer: Author) -> Marker:
    """What notices a model that ends the agent; once a start, before tasks are loaded."""
    marker, now = Marker(conf.data_dir), clock_of(store)()
    if not probation.settle(conf, store, writer, marker, now):
        quarantine.settle(conf, store, writer, marker, now)
    return marker


def load_task(
    file: Path,
    conf: Config,
    store: Store | None,
    name: str,
    path: Path | None = None,
    *,
    marker: Marker | None = None,
    known: Sequence[Choice] = (),
) -> Task:
    """A task with its bundle, or that at `path`, verified, probed and loaded. Raises ConfigError, BadBundle.

    With a `store`, how its model is run is taken from there and kept there, else from the `known`.
    """
    if path is None:
        path = history.bundle_of(conf, store, name)
        if store is not None:
            quarantine.refuse(store, name, path)

    def running(found: Bundle) -> AbstractContextManager[object]:
        return nullcontext() if marker is None else marker.running(name, found.digest)

    known = tuning_cache.known(store, name) if store else known
    active = activation.activate(path, publishers(file, conf), known, running)
    if store and active.choice:
        tuning_cache.remember(store, name, active.choice)
    return assemble(file, conf, store, name, active, running)


def assemble(
    file: Path,
    conf: Config,
    store: Store | None,
    name: str,
    active: Active,
    running: Callable[[Bundle], AbstractContextManager[object]],
) -> Task:
    """A task of a loaded bundle, with what the `store` remembers of it. Raises ConfigError."""
    task = conf.tasks[name]
    check_fields(file, conf, name, active.bundle)
    judge = _judge(str(file), conf, name, active)
    state, ended = (judge.start() if judge else None), None
    if judge is not None and store is not None:
        state, ended = _restore(store, name, active.bundle.digest, judge)
    digest, keeps = config.digest(conf), conf.buffer.keep_results > 0
    return Task(
        *(name, task, conf.streams[task.stream], active.bundle, active.model, judge, state, digest, keeps),
        ended=ended,
        choice=active.choice,
        running=partial(running, active.bundle),
        suspected=store is not None and quarantine.is_suspected(store, name, active.bundle.digest),
    )


def _restore(store: Store, name: str, digest: str, judge: Judge) -> tuple[State, Ended | None]:
    """What is remembered of drift; of a bundle beside which another is on probation, what was laid by."""
    if rollout_state.on_probation(store, name) not in ("", digest):
        return saved_drift.restore(store, name, judge)
    return drift_state.restore(store, name, judge)


def check_fields(file: Path, conf: Config, name: str, found: Bundle) -> None:
    stream = conf.tasks[name].stream
    _check_made(file, conf, name, found.manifest)
    numeric = {f.name for f in conf.streams[stream].fields if f.type != "category"}
    for field in found.manifest.input.fields:
        if field not in numeric:
            raise ConfigError(
                str(file),
                f"tasks.{name}.stream",
                f"bundle {found.manifest.name} needs numeric field {field!r}, stream {stream!r} has none"
                f"{suggestion(field, numeric)}",
            )


def _check_made(file: Path, conf: Config, name: str, manifest: Manifest) -> None:
    """Rows of images and sounds must be made as those the bundle was packed with. Raises ConfigError."""
    stream, wanted = conf.tasks[name].stream, manifest.input.image or manifest.input.sound
    made, fields = conf.streams[stream].made, {f.name for f in conf.streams[stream].fields}
    if wanted is None or made == wanted or (made is None and fields.issuperset(manifest.input.fields)):
        return
    source = f'source = {{ kind = "files", folder = "…", {media.written(wanted)} }}'
    raise ConfigError(
        str(file),
        f"tasks.{name}.stream",
        f"bundle {manifest.name} needs rows made otherwise than those of stream {stream!r}; give a stream {source}",
    )


def _judge(file: str, conf: Config, name: str, active: Active) -> Judge | None:
    if active.reference is None:
        return None
    task, manifest = conf.tasks[name], active.bundle.manifest
    return Judge(
        active.reference,
        labels=manifest.output.labels,
        window=manifest.drift.window,
        learn=task.learn,
        learn_s=float(task.learn_for),
        strata=task.strata or manifest.drift.strata or "auto",
        least=manifest.drift.min_count or 0,
        units=manifest.input.units,
        mode=_mode(file, name, task, conf.streams[task.stream], manifest),
    )


def _mode(file: str, name: str, task: config.Task, stream: config.Stream, manifest: Manifest) -> str:
    """The field whose values are modes, or "". Raises ConfigError."""
    key, asked = f"tasks.{name}.mode", manifest.drift.mode or ""
    if task.mode and manifest.output.labels:
        raise ConfigError(
            file, key, f"bundle {manifest.name} names classes itself, and these are its modes: remove mode"
        )
    if task.mode is None and asked:
        # The config's own was checked when it was read.
        config.check_mode(file, f'{key} (as bundle {manifest.name} says; mode = "" for none)', asked, stream)
    return asked if task.mode is None else task.mode
