"""Command `outstation run`: the daemon in the foreground. It needs no click."""

from __future__ import annotations

import gc
import logging
import signal
from functools import partial
from pathlib import Path
from typing import Any

from outstation.device import config
from outstation.device.bootstrap import device, homeassistant
from outstation.device.bootstrap.daemon import build_daemon
from outstation.device.commands import erasure, wipe
from outstation.device.config import Config
from outstation.device.machine.systemd import notify
from outstation.device.recovery.open import acquire_lock
from outstation.device.signals import Signals
from outstation.foundation.cli.log_format import configure_logging
from outstation.foundation.errors import ConfigError, StorageError, StorageForked, UsageError
from outstation.ml.model.sandbox import launch

logger = logging.getLogger("outstation")


def run(config_file: str | None, verbose: bool) -> None:
    """Run the daemon until a signal stops it; SIGHUP reloads its config. Raises UsageError, StorageError."""
    configure_logging(logging.DEBUG if verbose else logging.INFO, "%(levelname)s %(name)s: %(message)s")
    # Its debug messages would be about our own timers.
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    file, conf = device.load_config(config_file)
    if (wiped := erasure.read_marker(conf.data_dir)) is not None:
        # Exit 0: a service manager need not try again.
        if wiped.get("state") != "wiped":
            # A crash interrupted the wipe.
            acquire_lock(conf.data_dir)
            wiped = device.erase(file, conf, file.resolve().parent / device.KEY_FILE)
        logger.warning("%s", erasure.describe_marker(conf.data_dir, wiped))
        return
    # A signal that arrives while a daemon stops, or between two.
    between = Signals()
    before = signal.signal(signal.SIGHUP, lambda *_: between.request_reload())
    try:
        _run_daemons(file, conf, between)
    finally:
        signal.signal(signal.SIGHUP, before)


def _run_daemons(file: Path, conf: Config, between: Signals) -> None:
    """Run a daemon, and after a reload or in a new log the next one."""
    previous: Config | None = None
    has_forked = False
    while True:
        try:
            next_conf, previous = _run(file, conf, between), conf
        except StorageForked as forked:
            if has_forked:
                raise
            logger.critical("%s", str(forked))
            has_forked = True
            next_conf = conf
        except _NotStarted as problem:
            if previous is None:
                raise problem.cause from None
            logger.error("not reloaded, the config before is in force again: %s", problem.cause)
            notify(f"STATUS=Not reloaded: {problem.cause}")
            next_conf, previous = previous, None
        if next_conf is None or between.is_terminating:
            return
        conf = next_conf
        # An error or a cycle would keep the ended daemon and its models in memory.
        gc.collect()


class _NotStarted(Exception):
    """Failure to build a daemon from a config."""

    def __init__(self, cause: UsageError) -> None:
        self.cause = cause


def _run(file: Path, conf: Config, between: Signals) -> Config | None:
    """Run one daemon; return the config of the next one. Raises _NotStarted, StorageError.

    `between` holds a stop, and a reload that this daemon did not begin.
    """
    try:
        store = device.open_store(conf)
    except UsageError as error:
        raise _NotStarted(error) from None
    if wipe.is_pending(store):
        store.close()
        device.erase(file, conf, device.device_key_path(file, conf))
        return None
    before: dict[int, Any] = {}
    try:
        try:
            daemon = build_daemon(file, conf, store)
        except UsageError as error:
            raise _NotStarted(error) from None
        launch.discard_spare()
        signals = daemon.signals
        signals.read_config = partial(_read_config, file, conf)

        def terminate(*_: object) -> None:
            signals.terminate()
            between.terminate()

        for signum in (signal.SIGTERM, signal.SIGINT):
            before[signum] = signal.signal(signum, terminate)
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: signals.request_reload())
        if between.is_reload_requested:
            between.is_reload_requested = False
            signals.request_reload()
        try:
            with homeassistant.publishing(conf, store):
                daemon.run()
        except UsageError as error:
            raise _NotStarted(error) from None
        return signals.next_config
    except (StorageError, OSError):
        # The folder may have moved since the check before a transaction, or where there is none.
        store.require_in_place()
        raise
    finally:
        store.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        if before and signals.is_reload_requested:
            between.request_reload()


def _read_config(file: Path, conf: Config) -> Config | None:
    """Read the config again; return None, with a line in the log, if it does not fit this store."""
    try:
        new = config.load(file)
        for key, old_value, new_value in (
            ("device.id", conf.device.id, new.device.id),
            ("device.fleet", conf.device.fleet, new.device.fleet),
            ("device.data_dir", conf.data_dir, new.data_dir),
        ):
            if old_value != new_value:
                problem = f"is {new_value}, but the running daemon has {old_value}; restart it to change this"
                raise ConfigError(str(file), key, problem)
    except UsageError as error:
        logger.error("not reloaded, the config in force stays: %s", error)
        notify(f"STATUS=Not reloaded: {error}")
        return None
    logger.info("reloading %s", file)
    return new
