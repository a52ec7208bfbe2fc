"""Fixes: problems of an installation that a command can repair, each with what it would do."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec

from agent import clock, durable_files, input_files
from agent.bootstrap.device import KEY_FILE, TLS_KEY_FILE
from agent.config import Config
from agent.config.sources import ExecSource
from agent.device.machine import commitment_secret
from agent.errors import UsageError
from agent.wire import keys

_CLOCK_COMMAND = ("timedatectl", "set-ntp", "true")
_COMMAND_TIMEOUT_S = 20.0
_DELIVERY = re.compile(r'(?m)^(\s*delivery\s*=\s*)"collector"')


class Fix(msgspec.Struct, frozen=True):
    """Problem, what would be done about it, and the function that does it; that raises OSError, UsageError."""

    name: str
    problem: str
    action: str
    apply: Callable[[], object]


def find_fixes(file: Path, conf: Config) -> Iterator[Fix]:
    """Yield what can be fixed; nothing is changed until a fix is applied."""
    folder = file.resolve().parent
    if not conf.data_dir.exists():
        create = partial(conf.data_dir.mkdir, 0o750, parents=True)
        yield Fix("data folder", f"{conf.data_dir} does not exist", f"make the folder {conf.data_dir}", create)
    key = folder / KEY_FILE
    if not key.exists() and not (conf.data_dir / KEY_FILE).exists():
        yield Fix("key", f"{key} is missing", "make a key; a fleet has to enrol it", partial(keys.generate, key))
    secrets = [folder / KEY_FILE, folder / TLS_KEY_FILE, conf.data_dir / KEY_FILE]
    secrets += [conf.data_dir / commitment_secret.FILE, conf.intake_token_file, *conf.notify.secret_files]
    secrets += [Path(name) for name in (conf.broker.tls_key_file,) if name is not None]
    for path in dict.fromkeys(secrets):
        if (mode := _mode(path)) & 0o077:
            close = partial(os.chmod, path, 0o600)
            yield Fix("permissions", f"other users can read {path} (mode {mode:o})", f"chmod 600 {path}", close)
    if conf.collector.delivery == "collector" and not conf.collector.key:
        problem = "messages wait for a collector, and the config names none"
        action = f'set delivery = "broker" in {file}: without a fleet, what the broker loses is lost'
        yield Fix("collector", problem, action, partial(_deliver_to_broker, file))
    yield from _find_open_programs(file, conf)
    if clock.read().quality != "synced" and shutil.which(_CLOCK_COMMAND[0]) and os.geteuid() == 0:
        yield Fix("clock", "no time service sets the clock", " ".join(_CLOCK_COMMAND), _set_clock)


def _find_open_programs(file: Path, conf: Config) -> Iterator[Fix]:
    folder = file.resolve().parent
    for stream in conf.streams.values():
        if not isinstance(stream.source, ExecSource):
            continue
        for part in stream.source.command:
            path = folder / part
            if (mode := _mode(path)) & stat.S_IWOTH:
                close = partial(os.chmod, path, mode & ~stat.S_IWOTH)
                yield Fix("program", f"everybody may change {path}, which the daemon runs", f"chmod o-w {path}", close)


def _mode(path: Path) -> int:
    """Return the permissions of a regular file; 0 if there is none."""
    with contextlib.suppress(OSError, ValueError):
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            return stat.S_IMODE(status.st_mode)
    return 0


def _deliver_to_broker(file: Path) -> None:
    text = input_files.read_text(file)
    changed, count = _DELIVERY.subn(r'\1"broker"', text, count=1)
    if not count:
        match = re.search(r"(?m)^\[collector\][^\n]*\n", text)
        line = 'delivery = "broker"\n'
        changed = text[: match.end()] + line + text[match.end() :] if match else f"{text}\n[collector]\n{line}"
    durable_files.write(file, changed.encode(), stat.S_IMODE(file.stat().st_mode))


def _set_clock() -> None:
    try:
        subprocess.run(_CLOCK_COMMAND, check=True, capture_output=True, timeout=_COMMAND_TIMEOUT_S)
    except subprocess.SubprocessError as error:
        raise UsageError(f"{' '.join(_CLOCK_COMMAND)}: {error}; is systemd-timesyncd installed?") from None
