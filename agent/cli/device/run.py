"""`outstation run`."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Any

import click

from agent.bootstrap import commands, device, wiring
from agent.cli.output import config_option
from agent.config import Config
from agent.device.commands import wipe
from agent.device.recovery.open import own
from agent.errors import StorageForked


@click.command(epilog="Example: outstation run -c /etc/outstation/outstation.toml")
@config_option
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def run(config_file: str | None, verbose: bool) -> None:
    """The daemon, in the foreground; SIGTERM or Ctrl-C stops it gracefully."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # Its debug lines are about timers of ours.
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    file, conf = wiring.load(config_file)
    if (wiped := wipe.state(conf.data_dir)) is not None:
        # Exit 0: a service manager need not try again.
        logging.getLogger("outstation").warning("%s", wipe.told(conf.data_dir, _wiped_whole(file, conf, wiped)))
        return
    try:
        _run(file, conf)
        return
    except StorageForked as forked:
        logging.getLogger("outstation").critical("%s", str(forked))
    # Not while it is handled: the daemon that ended, with its models, would stay in memory.
    _run(file, conf)


def _run(file: Path, conf: Config) -> None:
    store = wiring.open_store(conf)
    if wipe.is_due(store):
        store.close()
        commands.erase(file, conf, wiring.given_key(file, conf))
        return
    before: dict[int, Any] = {}
    try:
        daemon = device.daemon(file, conf, store)
        for signum in (signal.SIGTERM, signal.SIGINT):
            before[signum] = signal.signal(signum, lambda *_: daemon.signals.halt())
        daemon.run()
    finally:
        store.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wiped_whole(file: Path, conf: Config, found: dict[str, Any]) -> dict[str, Any]:
    """What the marker says, once a wipe that a crash cut off is finished. Raises StorageBusy."""
    if found.get("state") == "wiped":
        return found
    own(conf.data_dir)
    return commands.erase(file, conf, file.resolve().parent / wiring.KEY_FILE)
