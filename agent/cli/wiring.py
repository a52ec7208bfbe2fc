"""Where the device's objects are put together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agent import clock, config
from agent.config import Config, FilesSource, HostSource, ReplaySource
from agent.device import schedule
from agent.device.author import Author
from agent.device.batch import Task
from agent.device.daemon import LAST_RUN, Daemon, Planned, clock_of
from agent.device.intake import Intake, Source
from agent.device.reports import Broken
from agent.device.store import Store
from agent.device.uplink import Uplink
from agent.drift.judge import Judge
from agent.errors import BadBundle, ConfigError, UsageError
from agent.model import activate
from agent.toml import suggestion
from agent.wire import keys
from agent.wire.keys import PublicKey, SigningKey

KEY_FILE = "device.key"


def open_store(conf: Config) -> Store:
    """The device's store, to write. Raises StorageError, UsageError."""
    store = Store(conf.data_dir, max_size=int(conf.buffer.max_size))
    try:
        store.claim(conf.device.fleet, conf.device.id)
        store.declare(conf.streams)
    except BaseException:
        store.close()
        raise
    return store


def device_key(file: Path, conf: Config) -> SigningKey:
    """The device's key, beside the config file or in the data folder. Raises UsageError."""
    for folder in (file.resolve().parent, conf.data_dir):
        if (folder / KEY_FILE).exists():
            return keys.load_private(folder / KEY_FILE)
    raise UsageError(f"{file.resolve().parent / KEY_FILE}: no device key; `outstation init` makes one")


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


def author(file: Path, conf: Config, store: Store) -> Author:
    key = device_key(file, conf)
    return Author(conf.device.fleet, conf.device.id, key, store.log_id, store.boot, conf.broker.max_message_bytes)


def load_task(file: Path, conf: Config, store: Store | None, name: str) -> Task:
    """A task with its bundle verified, probed and loaded. Raises ConfigError, BadBundle."""
    task = conf.tasks[name]
    stream = conf.streams[task.stream]
    path = activate.locate(task.bundle, conf.data_dir / "bundles")
    active = activate.activate(path, publishers(file, conf))
    manifest = active.bundle.manifest
    known = {f.name for f in stream.fields if f.type != "category"}
    for field in manifest.input.fields:
        if field not in known:
            raise ConfigError(
                str(file),
                f"tasks.{name}.stream",
                f"bundle {manifest.name} needs numeric field {field!r}, stream {task.stream!r} has none"
                f"{suggestion(field, known)}",
            )
    judge = None
    if active.reference is not None:
        judge = Judge(
            active.reference,
            labels=manifest.output.labels,
            window=manifest.drift.window,
            learn=task.learn,
            units=manifest.input.units,
        )
    state = judge.start() if judge else None
    kept = store.state(name, "drift") if store else None
    if judge is not None and kept is not None:
        try:
            state = judge.restore(kept)
        except ValueError:
            # Made by another bundle: its site reference says nothing about this one.
            state = judge.start()
    return Task(name, task, stream, active.bundle, active.model, judge, state, config.digest(conf))


def planned(file: Path, conf: Config, store: Store) -> tuple[list[Planned], list[Broken]]:
    """All tasks, loaded, and those whose bundle does not run here: these stop nothing else. Raises ConfigError."""
    schedules = {}
    for name, task in conf.tasks.items():
        last_run = int(store.state(name, LAST_RUN) or 0) or None
        schedules[name] = schedule.parse(str(file), name, task.schedule, last_run)
    good, broken = [], []
    for name, task in conf.tasks.items():
        try:
            good.append(Planned(load_task(file, conf, store, name), schedules[name]))
        except BadBundle as problem:
            broken.append(Broken(name, task.bundle, str(problem)))
    return good, broken


def sources(file: Path, conf: Config, store: Store) -> list[Source]:
    """The sources this device runs itself."""
    found: list[Source] = []
    for name, stream in conf.streams.items():
        source = stream.source
        if isinstance(source, FilesSource):
            from agent.device.sources.files import Files

            found.append(Files(name, stream, source, store))
        elif isinstance(source, HostSource):
            from agent.device.sources.host import Host

            found.append(Host(str(file), name, stream, source, conf.data_dir))
        elif isinstance(source, ReplaySource):
            from agent.device.sources.replay import Replay

            found.append(Replay(name, stream, source, store, clock.read()))
    return found


def daemon(file: Path, conf: Config, store: Store) -> Daemon:
    """The whole device. Raises UsageError."""
    writer = author(file, conf, store)
    now = clock_of(store)
    collector = configured_keys(file, "collector.key", [conf.collector.key])[0] if conf.collector.key else None
    if collector is None and conf.collector.delivery == "collector":
        raise ConfigError(
            str(file), "collector.key", 'empty: without it no acknowledgement counts; set it, or delivery = "broker"'
        )
    tasks, broken = planned(file, conf, store)
    own = sources(file, conf, store)

    def make_intake(committed: Callable[[], None], failed: Callable[[Exception], None]) -> Intake:
        return Intake(conf, store, own, now, committed, failed)

    def make_uplink(failed: Callable[[Exception], None]) -> Uplink:
        return Uplink(conf, store, writer, collector, now, failed)

    return Daemon(conf, store, writer, tasks, broken, make_intake, make_uplink, now)


def load(config_file: str | None) -> tuple[Path, Config]:
    """The config file in use and what it says. Raises ConfigError."""
    file = config.find(config_file)
    return file, config.load(file)
