"""Command `outstation run`: the daemon in the foreground."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import click

from agent.bootstrap import device, homeassistant
from agent.bootstrap.daemon import build_daemon
from agent.cli.log_format import configure_logging
from agent.cli.output import config_option
from agent.config import Config
from agent.device.commands import wipe
from agent.device.recovery.open import acquire_lock
from agent.errors import StorageForked
from agent.model.sandbox import launch


@click.command(epilog="Example: outstation run -c /etc/outstation/outstation.toml")
@config_option
@click.option("-v", "--verbose", is_flag=True, help="Log debug messages.")
def run(config_file: str | None, verbose: bool) -> None:
    """Run the daemon in the foreground; SIGTERM or Ctrl-C stops it gracefully."""
    configure_logging(logging.DEBUG if verbose else logging.INFO, "%(levelname)s %(name)s: %(message)s")
    # Its debug messages would be about our own timers.
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    file, conf = device.load_config(config_file)
    if (wiped := wipe.read_marker(conf.data_dir)) is not None:
        # Exit 0: a service manager need not try again.
        if wiped.get("state") != "wiped":
            # A crash interrupted the wipe.
            acquire_lock(conf.data_dir)
            wiped = device.erase(file, conf, file.resolve().parent / device.KEY_FILE)
        logging.getLogger("outstation").warning("%s", wipe.describe_marker(conf.data_dir, wiped))
        return
    try:
        _run(file, conf)
        return
    except StorageForked as forked:
        logging.getLogger("outstation").critical("%s", str(forked))
    # Outside the handler: the exception would keep the ended daemon and its models in memory.
    _run(file, conf)


def _run(file: Path, conf: Config) -> None:
    store = device.open_store(conf)
    if wipe.is_pending(store):
        store.close()
        device.erase(file, conf, device.device_key_path(file, conf))
        return
    before: dict[int, Any] = {}
    try:
        daemon = build_daemon(file, conf, store)
        launch.discard_spare()
        for signum in (signal.SIGTERM, signal.SIGINT):
            before[signum] = signal.signal(signum, lambda *_: daemon.signals.request_stop())
        with homeassistant.publishing(conf, store):
            daemon.run()
    finally:
        store.close()
        for number, handler in before.items():
            signal.signal(number, handler)
