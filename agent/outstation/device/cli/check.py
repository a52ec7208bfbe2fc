"""Command `outstation check`: check each part of an installation, and name the fix for each failure."""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path

import click
import msgspec
from msgspec.structs import asdict

from outstation.device.bootstrap import device, sinks, tasks
from outstation.device.bundles import history
from outstation.device.cli.cost import build_document as build_cost
from outstation.device.cli.status import format_metered
from outstation.device.config import Config, SamplesConfig, UpdatesConfig
from outstation.device.config.sinks import SINKS
from outstation.device.intake import feedback_loops
from outstation.device.intake.source import SourceContext, load_source_module
from outstation.device.machine import schedule, schedule_text
from outstation.device.machine.certificate import choose_certificate, read_end
from outstation.device.machine.timekeeping import build_report, make_clock, trusted_time_us
from outstation.device.pipeline import tuning_cache
from outstation.device.recovery.open import open_store
from outstation.device.recovery.report_findings import inspect_condition
from outstation.device.rollout.fetch import request as fetch_request
from outstation.device.rollout.fetch import version_floors
from outstation.device.rollout.fetch.fetcher import FetchProcess
from outstation.device.rules import compiler, sentences
from outstation.device.store.store import DATABASE, Store
from outstation.device.uplink import meter
from outstation.foundation import clock
from outstation.foundation.cli.cost_output import format_bytes
from outstation.foundation.cli.options import config_option, json_option
from outstation.foundation.cli.output import echo_wrapped, emit
from outstation.foundation.errors import (
    BadBundle,
    FetchFailed,
    LinkDown,
    OutstationError,
    StorageBusy,
    UsageError,
    explain,
)
from outstation.foundation.text import count_columns, pad, printable
from outstation.integrations.notify.config import Target
from outstation.ml.kernel import library
from outstation.ml.model.bundle import bundle
from outstation.ml.model.inference.tuning import Tuning
from outstation.ml.model.sandbox import confinement

_FETCH_TIMEOUT_S = 20.0
# Of the bytes of a message, with `[broker] compress`.
_COMPRESSED_SHARE = 0.3
# `fleet devices renew` renews 90 days before the end, each day.
_CERTIFICATE_WARNING_DAYS = 60
STATE_COLORS = {"ok": "green", "warning": "yellow", "failed": "red"}


class CheckResult(msgspec.Struct, frozen=True):
    """One line of the report; `state` is ok, warning or failed."""

    name: str
    state: str
    detail: str


class ConfigFault(CheckResult, frozen=True):
    """A failure whose cause is the config file."""


@click.command(epilog="Example: outstation check -c /etc/outstation/outstation.toml")
@config_option
@click.option("--config-only", is_flag=True, help="Check the config file alone, as a reload does before it begins.")
@json_option
def check(config_file: str | None, config_only: bool, as_json: bool) -> None:
    """Check config, keys, bundles on this processor, storage, clock, update repository and broker.

    Exit 1 if something is wrong, 2 if that is the config.

    Each alert rule of a task (`[[tasks.NAME.alerts]]`) is explained: when its alert is raised and when it clears.
    """
    file, conf = device.load_config(config_file)
    checks = _check_values(file, conf) if config_only else run_checks(file, conf)
    results = [CheckResult("config", "ok", str(file)), *checks]
    emit([asdict(result) for result in results], as_json, lambda: _print(results))
    if any(result.state == "failed" for result in results):
        sys.exit(2 if any(isinstance(result, ConfigFault) for result in results) else 1)


def _check_values(file: Path, conf: Config) -> Iterator[CheckResult]:
    """Check keys, TLS files, sources and schedules, which loading the config does not look at."""
    if conf.collector.key:
        yield _check_collector(file, conf)
    yield _run_check("trusted keys", lambda: _check_keys(file, conf))
    for key in ("ca_file", "cert_file", "tls_key_file"):
        path = getattr(conf.broker, key)
        if path is not None and not Path(path).is_file():
            fix = "`outstation join` brings it; correct the path, or remove the key"
            yield ConfigFault("broker", "failed", f"{file}: broker.{key}: no file {path}; {fix}")
    yield from _check_sources(file, conf)
    for name, task in conf.tasks.items():
        yield _run_check(f"schedule {name}", lambda n=name, t=task: _check_schedule(file, n, t.schedule))  # type: ignore[misc]


def _check_sources(file: Path, conf: Config) -> Iterator[CheckResult]:
    for name, stream in conf.streams.items():
        context = SourceContext(str(file), conf, name)
        if (module := load_source_module(context)) is not None:
            yield _run_check(f"stream {name}", partial(module.check, context, stream.source))


def _check_keys(file: Path, conf: Config) -> str:
    lists = [(f"operators.{name}", getattr(conf.operators, name)) for name in ("keys", "deployers", "reporters")]
    lists.append(("publishers.keys", conf.publishers.keys))
    # A key that nothing is sealed to yet is used once `encrypt` is set.
    sinks.find_encryption_key(file, conf)
    count = sum(len(tasks.parse_public_keys(file, key, texts)) for key, texts in lists)
    return f"{count} of operators and publishers"


def run_checks(file: Path, conf: Config) -> Iterator[CheckResult]:
    yield _run_check("key", lambda: f"thumbprint {device.load_key_files(file, conf).load_active().public.kid}")
    yield _check_collector(file, conf)
    yield _run_check("trusted keys", lambda: _check_keys(file, conf))
    if (end := read_end(conf)) is not None:
        yield _check_certificate(end)
    if conf.privacy.encrypt:
        yield _run_check("encryption", lambda: f"messages are sealed to {sinks.load_encryption_key(file, conf).kid}")
    if conf.samples is not None:
        yield _run_check("samples", lambda s=conf.samples: _describe_samples(file, conf, s))  # type: ignore[misc]
    if not conf.streams:
        yield CheckResult("streams", "warning", "none: no readings come in; add a [streams.NAME] section")
    if not conf.tasks:
        yield CheckResult("tasks", "warning", "none: no model runs; add a [tasks.NAME] section")
    yield from _check_sources(file, conf)
    for loop in feedback_loops.find(conf):
        yield CheckResult(f"feedback {loop.stream}", "warning", loop.summary)
    if conf.tasks:
        yield _check_confinement(conf)
        yield CheckResult("kernel", "ok", f"statistics by {library.describe()}")
    for name, task in conf.tasks.items():
        yield _run_check(f"schedule {name}", lambda n=name, t=task: _check_schedule(file, n, t.schedule))  # type: ignore[misc]
        yield _run_check(f"bundle {name}", lambda n=name: _check_bundle(file, conf, n))  # type: ignore[misc]
        for index, rule in enumerate(task.alerts):
            yield _run_check(f"alert {name}/{rule.name}", lambda n=name, i=index: _check_rule(file, conf, n, i))  # type: ignore[misc]
    # Before the store is opened for writing: that resets how the last process stopped.
    yield from _check_store_condition(conf)
    running = _is_running(conf)
    yield _check_storage(conf, running)
    yield _check_clock(conf)
    yield from _check_metered(conf)
    for name, target in conf.notify.targets.items():
        yield _check_target(name, target)
    if conf.updates is not None:
        yield _run_check("updates", lambda u=conf.updates: inspect_repository(conf, u))  # type: ignore[misc]
    if SINKS.is_shipped(conf.broker.scheme):
        yield _run_check("broker", lambda: _check_broker_reachable(conf) if running else _check_broker_login(conf))
    else:
        yield _run_check("sink", lambda: sinks.load_sink_module(file, conf).check(conf))


def _run_check(name: str, action: Callable[[], str | CheckResult]) -> CheckResult:
    try:
        outcome = action()
        return CheckResult(name, "ok", outcome) if isinstance(outcome, str) else outcome
    except UsageError as problem:
        return ConfigFault(name, "failed", str(problem))
    except OutstationError as problem:
        return CheckResult(name, "failed", str(problem))


def _check_collector(file: Path, conf: Config) -> CheckResult:
    if conf.collector.delivery == "broker":
        return CheckResult("collector", "warning", 'delivery = "broker": what the broker loses is lost')
    if not conf.collector.key:
        fix = 'set delivery = "broker" to run without a fleet, or `outstation join` one'
        return CheckResult("collector", "failed", f"{file}: collector.key is empty; {fix}")
    return _run_check("collector", lambda: tasks.parse_public_keys(file, "collector.key", [conf.collector.key])[0].kid)


def _check_metered(conf: Config) -> Iterator[CheckResult]:
    """Compare the budget of a metered connection with what the tasks send."""
    metered = conf.broker.metered
    if metered is None:
        return
    if not (conf.data_dir / DATABASE).exists():
        yield CheckResult("metered", "ok", "bytes are counted from the first start on")
        return
    with suppress(OutstationError), device.open_store_read_only(conf) as store:
        now = make_clock(store)()
        document = meter.build_status(metered, store, now)
        detail = format_metered(document)
        day = build_cost(conf, store, [*conf.tasks])["per_day"]["air_bytes"]
        if day is not None and conf.broker.compress:
            # Counted before compression.
            day *= _COMPRESSED_SHARE
        bulk = None if metered.budget is None else meter.budget_share(metered.budget, urgent=False)
        if bulk is not None and day is not None and day > bulk:
            fate = "is given up" if metered.max_age is not None else "waits, and fills the store"
            detail += (
                f"; messages take {day / 1e6:,.2f} MB a day, more than the {bulk / 1e6:,.2f} MB for bulk: the rest "
                f"{fate}. "
                'Raise [broker.metered] budget, set compress = true, or publish = "changes"'
            )
            yield CheckResult("metered", "warning", detail)
        elif metered.day_windows and now.quality == "unsynced":
            yield CheckResult("metered", "warning", f"{detail}; the clock is not set, so windows follow the uptime")
        else:
            yield CheckResult("metered", "ok", detail)


def _check_certificate(end: datetime) -> CheckResult:
    left = (end.timestamp() - clock.read().wall_us / 1e6) / 86_400
    if left > _CERTIFICATE_WARNING_DAYS:
        return CheckResult("certificate", "ok", f"valid until {end:%Y-%m-%d}")
    fix = (
        "`outstation fleet devices renew` at the operator; after its end, `outstation request` here and `join` "
        "the answer"
    )
    state = "failed" if left <= 0 else "warning"
    return CheckResult("certificate", state, f"{'ended' if left <= 0 else 'ends'} on {end:%Y-%m-%d}: {fix}")


def _check_target(name: str, target: Target) -> CheckResult:
    """Check what a target needs here; `outstation notify test` sends a message."""
    from outstation.integrations.notify import sending

    result = _run_check(f"notify {name}", lambda: sending.load_module(target).check(target))
    if result.state == "ok" and (exposed := sending.find_exposed_secret(target)):
        return CheckResult(result.name, "warning", f"{exposed}: every user of this machine can read it; chmod 600")
    return result


def _describe_samples(file: Path, conf: Config, samples: SamplesConfig) -> str:
    """Say which readings leave the device. Raises ConfigError without a key to seal them to."""
    key = sinks.load_encryption_key(file, conf, "[samples] seals readings")
    uncertain = samples.uncertain_below and f"results with a score below {samples.uncertain_below:g}"
    reasons = [samples.on_alert and "alerts", uncertain, samples.on_request and "results that an operator asks for"]
    named = ", ".join(reason for reason in reasons if reason) or "nothing"
    tasks = ", ".join(samples.tasks) or "all tasks"
    limits = f"{samples.digits} digits, at most {int(samples.max_per_day)} bytes a day"
    return f"readings of {tasks} around {named} leave the device ({limits}), sealed to {key.kid}: {samples.consent}"


def _check_confinement(conf: Config) -> CheckResult:
    if conf.models.confinement == "off":
        return CheckResult("confinement", "warning", "off: models run in the daemon, which holds the device's keys")
    limit = f"at most {tasks.model_policy(conf).memory_mib} MiB"
    if not (obstacle := confinement.find_obstacle()):
        return CheckResult("confinement", "ok", f"models run in processes without files, network and keys, {limit}")
    level = "failed" if conf.models.confinement == "required" else "warning"
    return CheckResult("confinement", level, f"{obstacle}; models run in unconfined processes of their own, {limit}")


def _check_schedule(file: Path, name: str, text: str) -> str | CheckResult:
    parsed = schedule_text.parse(str(file), name, text)
    if schedule.has_ended(parsed, clock.read()):
        return CheckResult(f"schedule {name}", "warning", f"{text}: its dates are over, so the task never runs again")
    return text


def _check_bundle(file: Path, conf: Config, name: str) -> str:
    task = tasks.load_task(file, conf, None, name, known_tunings=_load_known_tunings(conf, name))
    drift = "with drift reference" if task.drift else "without drift reference: drift is not tested"
    manifest = task.bundle.manifest
    pace = f", {task.tuning}" if task.tuning else ""
    return f"{manifest.name} {manifest.version}, golden vectors right on this CPU{pace}, {drift}"


def _check_rule(file: Path, conf: Config, task: str, index: int) -> str:
    """Return what an alert rule does, checked against the bundle that the config names, if that can be read."""
    rule = conf.tasks[task].alerts[index]
    with suppress(BadBundle):
        manifest = bundle.read(history.locate_bundle(conf, None, task), None).manifest
        compiler.compile_rule(str(file), task, index, rule, manifest)
    return sentences.explain(rule)


def _load_known_tunings(conf: Config, task: str) -> list[Tuning]:
    """Return the tunings of the daemon that runs here; without a store, the check tunes the model itself."""
    with suppress(OutstationError), Store.open_read_only(conf.data_dir) as store:
        return tuning_cache.load(store, task)
    return []


def _is_running(conf: Config) -> bool:
    try:
        open_store(conf.data_dir, max_size=int(conf.buffer.max_size), with_journal=conf.buffer.journal).close()
    except StorageBusy:
        return True
    except (OutstationError, OSError):
        pass
    return False


def _check_storage(conf: Config, running: bool) -> CheckResult:
    limit = int(conf.buffer.max_size)
    try:
        opened = (
            Store.open_read_only(conf.data_dir)
            if running
            else open_store(conf.data_dir, max_size=limit, with_journal=conf.buffer.journal)
        )
        with opened as store:
            used = store.used_bytes()
        free = shutil.disk_usage(conf.data_dir).free
    except (OutstationError, OSError) as problem:
        return CheckResult("storage", "failed", f"{problem}; check [device] data_dir and its owner")
    text = f"{conf.data_dir}{', in use by the running daemon' * running}, {used >> 10} KiB of {limit >> 20} MiB used"
    if free >= limit - used:
        return CheckResult("storage", "ok", text)
    shortage = f"the disk has {format_bytes(free)} left, too little for them: make room, or lower [buffer] max_size"
    return CheckResult("storage", "warning", f"{text}; {shortage}")


def _check_store_condition(conf: Config) -> Iterator[CheckResult]:
    try:
        store = Store.open_read_only(conf.data_dir)
    except OutstationError:
        return
    try:
        condition = inspect_condition(store)
    except OutstationError as problem:
        yield CheckResult("store", "warning", f"{problem}")
        return
    finally:
        store.close()
    has_problem = condition.last_stop == "unclean" or condition.last_finding or condition.quarantine
    yield CheckResult("store", "warning" if has_problem else "ok", str(condition))


def _check_clock(conf: Config) -> CheckResult:
    try:
        with Store.open_read_only(conf.data_dir) as store:
            now = make_clock(store)()
            floor = build_report(store, now)["floor"]
    except OutstationError:
        now, floor = clock.read(), clock.to_rfc3339(clock.BUILD_FLOOR_US)
    shown = clock.to_rfc3339(now.wall_us)
    if now.error_us is not None and now.quality == "synced":
        return CheckResult("clock", "ok", f"{shown}, synchronized to {now.error_us / 1e6:.3f} s")
    earlier = f" and earlier than {floor}, which has passed" if now.quality == "unsynced" else ""
    fix = "rows are dated afterwards, once a time service (systemd-timesyncd, chrony) has set it"
    return CheckResult("clock", "warning", f"{shown}, {now.quality}{earlier}: {fix}")


def _check_broker_reachable(conf: Config) -> str:
    """Connect without a login, for which the broker would disconnect the running daemon."""
    try:
        socket.create_connection((conf.broker.host, conf.broker.port), 5).close()
    except OSError as error:
        raise LinkDown(f"{conf.broker.shown_url}: {explain(error)}") from None
    return f"{conf.broker.shown_url} answers; see the log of the running daemon for its login"


def _check_broker_login(conf: Config) -> CheckResult | str:
    from outstation.protocol.transport.mqtt import Link

    link = Link(choose_certificate(conf), conf.device.id, retains=True, timeout_s=5)
    link.close()
    limit, largest = link.max_packet, conf.broker.max_message_bytes
    text = f"{conf.broker.shown_url}, messages up to {min(limit, largest)} bytes"
    if limit < largest:
        problem = f"the broker takes {limit} bytes at most, and keeps larger messages on the device"
        fix = f"lower [broker] max_message_bytes from {largest}, so that they are split, or raise the broker's limit"
        return CheckResult("broker", "warning", f"{text}: {problem}; {fix}")
    if not link.capabilities.shared_subscriptions:
        problem = "the broker has no shared subscriptions, so the fleet has one collector (no --share)"
        return CheckResult("broker", "ok", f"{text}; {problem}")
    return text


def inspect_repository(conf: Config, updates: UpdatesConfig) -> str:
    """Fetch the repository's metadata without storing it, and return a summary. Raises OutstationError."""
    now = clock.read()
    try:
        store = Store.open_read_only(conf.data_dir)
    except OutstationError:
        floors, time_us = version_floors.VersionFloors(), max(now.wall_us, clock.BUILD_FLOOR_US)
    else:
        floors, time_us = version_floors.load(store), trusted_time_us(store, now)
        store.close()
    with tempfile.TemporaryDirectory(prefix="outstation-") as folder:
        request = fetch_request.build_metadata_request(conf, updates, floors, time_us)
        request = msgspec.structs.replace(request, metadata_dir=folder, timeout_s=_FETCH_TIMEOUT_S)
        process = FetchProcess(request, clock.boot_seconds())
        try:
            while not process.has_ended(clock.boot_seconds()):
                time.sleep(0.02)
        except BaseException:
            process.kill_and_wait()
            raise
        response = process.read_response()
    if response.error:
        raise FetchFailed(response.error, response.detail)
    versions = {role: floor.version for role, floor in response.floors.roles.items()}
    expires = clock.to_rfc3339(round((response.floors.expires_s or 0.0) * 1e6))[:10]
    return f"{updates.url}, root {versions['root']}, timestamp {versions['timestamp']}, valid until {expires}"


def _print(results: list[CheckResult]) -> None:
    width = max(count_columns(printable(result.name)) for result in results)
    for result in results:
        state = click.style(result.state.ljust(7), fg=STATE_COLORS[result.state])
        line = f"{state}  {pad(printable(result.name), width)}  {printable(result.detail)}"
        echo_wrapped(line, width + 11, in_terminal_only=True)
