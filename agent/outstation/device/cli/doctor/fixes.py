"""Fixes: problems of an installation that a command can repair, each with what it would do."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec

from outstation.device.bootstrap.credentials import sealed_path
from outstation.device.bootstrap.device import KEY_FILE, TLS_KEY_FILE
from outstation.device.config import Config
from outstation.device.config.sources import ExecSource
from outstation.device.machine import secret_file
from outstation.foundation import durable_files, input_files
from outstation.foundation.owner import give_files
from outstation.protocol.wire import keys

# Bytes a day that shorten the life of a card, and the interval of commits that does not.
_MUCH_WRITTEN, _FEW_COMMITS_S = 10**9, 5.0


class Fix(msgspec.Struct, frozen=True):
    """Problem, what would be done to a file about it, and the function that does it.

    That raises OSError, StorageError.
    """

    name: str
    path: Path
    problem: str
    action: str
    apply: Callable[[], object]


def find_fixes(file: Path, conf: Config, written_per_day: int | None) -> Iterator[Fix]:
    """Yield what can be fixed; nothing is changed until a fix is applied. `written_per_day`: bytes on flash."""
    folder = file.resolve().parent
    key = folder / KEY_FILE
    if not any(path.exists() for path in (key, sealed_path(key), conf.data_dir / KEY_FILE)):
        make = partial(_make_key, key, conf.data_dir)
        yield Fix("key", key, f"{key} is missing", "make a key; a fleet has to enrol it", make)
    secrets = [folder / KEY_FILE, folder / TLS_KEY_FILE, conf.data_dir / KEY_FILE]
    secrets += [conf.data_dir / secret.name for secret in (secret_file.COMMITMENT_SECRET, secret_file.LABEL_KEY)]
    secrets += [conf.intake_token_file, *conf.notify.secret_files]
    secrets += [Path(name) for name in (conf.broker.tls_key_file,) if name is not None]
    for path in dict.fromkeys(secrets):
        if (mode := _mode(path)) & 0o077:
            close = partial(_close, path, conf.data_dir)
            yield Fix("permissions", path, f"other users can read {path} (mode {mode:o})", f"chmod 600 {path}", close)
    if conf.collector.delivery == "collector" and not conf.collector.key:
        problem = "messages wait for a collector, and the config names none"
        action = f'set delivery = "broker" in {file}: without a fleet, what the broker loses is lost'
        yield Fix("collector", file, problem, action, partial(_set_key, file, "collector", "delivery", "broker"))
    if (written_per_day or 0) > _MUCH_WRITTEN and conf.buffer.commit_every < _FEW_COMMITS_S:
        problem = f"{(written_per_day or 0) / 1e9:.1f} GB are written a day, most of them by a commit each second"
        action = f'set commit_every = "10 s" in {file}: producers wait longer for their answers'
        yield Fix("flash", file, problem, action, partial(_set_key, file, "buffer", "commit_every", "10 s"))
    yield from _find_open_programs(file, conf)


def _find_open_programs(file: Path, conf: Config) -> Iterator[Fix]:
    folder = file.resolve().parent
    for stream in conf.streams.values():
        if not isinstance(stream.source, ExecSource):
            continue
        for part in stream.source.command:
            path = folder / part
            if (mode := _mode(path)) & stat.S_IWOTH:
                close = partial(os.chmod, path, mode & ~stat.S_IWOTH)
                problem = f"everybody may change {path}, which the daemon runs"
                yield Fix("program", path, problem, f"chmod o-w {path}", close)


def belongs_to_root(path: Path) -> bool:
    """Return True if nobody but root can change which file `path` names; the file is root's, or missing."""
    path = path.absolute()
    with contextlib.suppress(OSError):
        for folder in path.parents:
            status = folder.lstat()
            is_shared = status.st_mode & 0o022 and not (stat.S_ISLNK(status.st_mode) or status.st_mode & stat.S_ISVTX)
            if status.st_uid != 0 or is_shared:
                return False
        return not os.path.lexists(path) or path.lstat().st_uid == 0
    return False


def _make_key(key: Path, data_dir: Path) -> None:
    keys.generate(key)
    give_files(key.parent, data_dir, [KEY_FILE, keys.public_key_path(key).name])


def _close(path: Path, data_dir: Path) -> None:
    os.chmod(path, 0o600)
    if os.geteuid() == 0 and data_dir.is_dir():
        # Its group read it until now: the daemon.
        os.chown(path, data_dir.stat().st_uid, -1)


def _mode(path: Path) -> int:
    """Return the permissions of a regular file; 0 if there is none."""
    with contextlib.suppress(OSError, ValueError):
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            return stat.S_IMODE(status.st_mode)
    return 0


def _set_key(file: Path, section: str, key: str, value: str) -> None:
    """Set a text in a section of TOML, and leave all other lines as they are. Raises OSError, StorageError."""
    text, line = input_files.read_text(file), f'{key} = "{value}"'
    head = re.search(rf"(?m)^\[{section}\][^\n]*\n", text)
    if head is None:
        changed = f"{text.rstrip()}\n\n[{section}]\n{line}\n"
    else:
        rest = text[head.end() :]
        following = re.search(r"(?m)^\[", rest)
        own = rest[: following.start()] if following else rest
        replaced, count = re.subn(rf'(?m)^(\s*){key}\s*=\s*"[^"\n]*"', rf"\g<1>{line}", own, count=1)
        changed = text[: head.end()] + (replaced if count else f"{line}\n{own}") + rest[len(own) :]
    status = file.stat()
    durable_files.write(file, changed.encode(), stat.S_IMODE(status.st_mode))
    if os.geteuid() == 0:
        # The daemon's group still reads it.
        os.chown(file, status.st_uid, status.st_gid)
