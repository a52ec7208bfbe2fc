"""`outstation check`: one line for each thing that must be right, with the fix where it is not."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import msgspec
from msgspec.structs import asdict

from agent import clock, media
from agent.bootstrap import tasks, wiring
from agent.cli.device import check_updates
from agent.cli.output import config_option, emit, json_option
from agent.config import Config, FilesSource, HostSource, MqttSource, ReplaySource
from agent.device.machine import schedule
from agent.device.machine.timekeeping import clock_of, report
from agent.device.pipeline import tuning_cache
from agent.device.recovery.condition import condition
from agent.device.store.store import Store
from agent.errors import LinkDown, OutstationError, StorageBusy
from agent.model.inference.tuning import Choice

_MARKS = {"ok": "green", "warning": "yellow", "failed": "red"}


class Finding(msgspec.Struct, frozen=True):
    name: str
    state: str
    detail: str


@click.command(epilog="Example: outstation check -c /etc/outstation/outstation.toml")
@config_option
@json_option
def check(config_file: str | None, as_json: bool) -> None:
    """Config, keys, bundles on this CPU, storage, clock and broker."""
    file, conf = wiring.load(config_file)
    findings = [Finding("config", "ok", str(file)), *_findings(file, conf)]
    emit([asdict(f) for f in findings], as_json, lambda: _print(findings))
    if any(f.state == "failed" for f in findings):
        sys.exit(1)


def _findings(file: Path, conf: Config) -> Iterator[Finding]:
    yield _try("key", lambda: f"thumbprint {wiring.key_files(file, conf).in_force().public.kid}")
    yield _collector(file, conf)
    if not conf.streams:
        yield Finding("streams", "warning", "none: nothing comes in; add a [streams.NAME] section")
    if not conf.tasks:
        yield Finding("tasks", "warning", "none: no model runs; add a [tasks.NAME] section")
    for name, stream in conf.streams.items():
        if stream.made is not None or isinstance(stream.source, HostSource | MqttSource | ReplaySource):
            yield _try(f"stream {name}", lambda n=name: _source(file, conf, n))  # type: ignore[misc]
    for name, task in conf.tasks.items():
        yield _try(f"schedule {name}", lambda n=name, t=task: _schedule(file, n, t.schedule))  # type: ignore[misc]
        yield _try(f"bundle {name}", lambda n=name: _bundle(file, conf, n))  # type: ignore[misc]
    # Before the store is opened to write, which ends what it tells.
    yield from _condition(conf)
    running = _is_running(conf)
    yield Finding("storage", "ok", f"{conf.data_dir}, in use by the running agent") if running else _storage(conf)
    yield _clock(conf)
    if conf.updates is not None:
        yield _try("updates", lambda u=conf.updates: check_updates.look(conf, u))  # type: ignore[misc]
    yield _try("broker", lambda: _reach(conf) if running else _connect(conf))


def _try(name: str, action: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", action())
    except OutstationError as problem:
        return Finding(name, "failed", str(problem))


def _collector(file: Path, conf: Config) -> Finding:
    if conf.collector.delivery == "broker":
        return Finding("collector", "warning", 'delivery = "broker": what the broker loses is lost')
    if not conf.collector.key:
        return Finding("collector", "failed", f"{file}: collector.key is empty; `outstation fleet init` prints it")
    return _try("collector", lambda: tasks.configured_keys(file, "collector.key", [conf.collector.key])[0].kid)


def _schedule(file: Path, name: str, text: str) -> str:
    schedule.parse(str(file), name, text)
    return text


def _source(file: Path, conf: Config, name: str) -> str:
    """What `assembly.sources` would refuse, without a store."""
    stream = conf.streams[name]
    source = stream.source
    if isinstance(source, HostSource):
        from agent.device.intake.sources import host

        host.require(str(file), name, stream)
        return f"{', '.join(field.name for field in stream.fields)} of this machine"
    if isinstance(source, MqttSource):
        from agent.device.intake.sources import mqtt

        mqtt.require(str(file), name, stream, source)
        return f"{source.topic} at {source.broker.url}"
    if isinstance(source, ReplaySource):
        from agent.device.intake.sources import replay

        recordings = replay.playlist(stream, source).recordings
        return f"a replay of the {len(recordings.rows):,} rows in {source.file}"
    from agent.device.intake import media_reader

    media_reader.require(str(file), name, stream, int(conf.buffer.max_size))
    assert isinstance(source, FilesSource)
    assert stream.made is not None
    return f"{media.written(stream.made)}, of the files in {source.folder}"


def _bundle(file: Path, conf: Config, name: str) -> str:
    task = tasks.load_task(file, conf, None, name, known=_choices(conf, name))
    drift = "with drift reference" if task.judge else "without drift reference: drift is not watched"
    manifest = task.bundle.manifest
    pace = f", {task.choice}" if task.choice else ""
    return f"{manifest.name} {manifest.version}, golden vectors right on this CPU{pace}, {drift}"


def _choices(conf: Config, task: str) -> list[Choice]:
    """What the agent that runs here goes by; without a store the check tries for itself."""
    try:
        store = Store(conf.data_dir, read_only=True)
    except OutstationError:
        return []
    try:
        return tuning_cache.known(store, task)
    finally:
        store.close()


def _is_running(conf: Config) -> bool:
    try:
        Store(conf.data_dir, max_size=int(conf.buffer.max_size)).close()
    except StorageBusy:
        return True
    except (OutstationError, OSError):
        return False
    return False


def _storage(conf: Config) -> Finding:
    try:
        store = Store(conf.data_dir, max_size=int(conf.buffer.max_size))
        used = store.used_bytes()
        store.close()
    except (OutstationError, OSError) as problem:
        return Finding("storage", "failed", f"{problem}; check [device] data_dir and its owner")
    return Finding("storage", "ok", f"{conf.data_dir}, {used >> 10} KiB of {int(conf.buffer.max_size) >> 20} MiB used")


def _condition(conf: Config) -> Iterator[Finding]:
    try:
        store = Store(conf.data_dir, read_only=True)
    except OutstationError:
        return
    try:
        found = condition(store)
    except OutstationError as problem:
        yield Finding("store", "warning", f"{problem}")
        return
    finally:
        store.close()
    doubtful = found.stop == "unclean" or found.last or found.quarantine
    yield Finding("store", "warning" if doubtful else "ok", str(found))


def _clock(conf: Config) -> Finding:
    try:
        store = Store(conf.data_dir, read_only=True)
    except OutstationError:
        now, past = clock.read(), clock.rfc3339(clock.BUILD_FLOOR_US)
    else:
        try:
            now = clock_of(store)()
            past = report(store, now)["floor"]
        finally:
            store.close()
    time = clock.rfc3339(now.wall_us)
    if now.error_us is not None and now.quality == "synced":
        return Finding("clock", "ok", f"{time}, synchronized to {now.error_us / 1e6:.3f} s")
    earlier = f" and earlier than {past}, which has passed" if now.quality == "unsynced" else ""
    fix = "rows are dated afterwards, once a time service (systemd-timesyncd, chrony) has set it"
    return Finding("clock", "warning", f"{time}, {now.quality}{earlier}: {fix}")


def _reach(conf: Config) -> str:
    """Without a login: the broker would throw the running agent off."""
    try:
        socket.create_connection((conf.broker.host, conf.broker.port), 5).close()
    except OSError as error:
        raise LinkDown(f"{conf.broker.url}: {error}; is the broker running and reachable?") from None
    return f"{conf.broker.url} answers; the running agent is logged in, see its log"


def _connect(conf: Config) -> str:
    from agent.transport.mqtt import Link

    try:
        link = Link(conf.broker, conf.device.id, timeout_s=5)
    except LinkDown as down:
        raise LinkDown(f"{down}; is the broker running and reachable?") from None
    link.close()
    return f"{conf.broker.url}, messages up to {min(link.max_packet, conf.broker.max_message_bytes)} bytes"


def _print(findings: list[Finding]) -> None:
    width = max(len(f.name) for f in findings)
    for f in findings:
        click.echo(f"{click.style(f.state.ljust(7), fg=_MARKS[f.state])}  {f.name.ljust(width)}  {f.detail}")
