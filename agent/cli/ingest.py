"""`outstation ingest`: a file of readings into a stream."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import click

from agent import clock
from agent.cli import wiring
from agent.cli.output import config_option, emit, json_option
from agent.client import Client
from agent.config import Config, Stream, suggestion
from agent.device.group import FULL_ROWS, Group
from agent.device.readfile import Block, blocks
from agent.device.rows import Checked, check
from agent.errors import ConfigError, OutstationError, Rejected, StorageBusy, UsageError

_SHOWN = 20
_COLUMNS_A_LINE = 1024


class Target(Protocol):
    """Where checked rows go; `finish` returns once they are safe."""

    def put(self, checked: Checked, lines: list[int]) -> None: ...

    def finish(self) -> None: ...


@click.command(epilog="Example: outstation ingest watch readings.csv")
@click.argument("stream")
@click.argument("file", default="-")
@config_option
@json_option
def ingest(stream: str, file: str, config_file: str | None, as_json: bool) -> None:
    """Take CSV, JSON Lines or Parquet from FILE (- is stdin) into STREAM.

    Goes through the running daemon, or straight into the store when none runs. The first line of a CSV names its
    columns: the stream's fields and, if there is one, t (epoch seconds or RFC 3339). Exit 1 where a row was rejected.
    """
    conf_file, conf = wiring.load(config_file)
    if stream not in conf.streams:
        raise ConfigError(str(conf_file), "streams", f"there is no stream {stream!r}{suggestion(stream, conf.streams)}")
    accepted, rejected = _take(conf, stream, file)
    document = {"accepted": accepted, "rejected": [{"line": n, "reason": r} for n, r in sorted(rejected.items())]}
    emit(document, as_json, lambda: _print(accepted, rejected))
    if rejected:
        sys.exit(1)


def _take(conf: Config, stream: str, file: str) -> tuple[int, dict[int, str]]:
    path = None if file == "-" else Path(file)
    rejected: dict[int, str] = {}
    accepted = 0
    target = _target(conf, stream)
    with _open(path) as text, _progress(path) as bar:
        try:
            for checked, lines, bad, through in _checked(
                blocks(path, text, conf.streams[stream]), conf.streams[stream]
            ):
                rejected |= bad
                if len(checked.rows):
                    target.put(checked, lines)
                    accepted += len(checked.rows)
                bar(through)
        except Rejected as problem:
            raise UsageError(f"{file}: {problem}") from None
        except UnicodeDecodeError as problem:
            raise UsageError(f"{file}: not text: {problem}") from None
        target.finish()
    return accepted, rejected


def _checked(found: Iterator[Block], stream: Stream) -> Iterator[tuple[Checked, list[int], dict[int, str], int]]:
    """Rows that are right, their line numbers, and the reason for each line that is not."""
    latest: int | None = None
    for block in found:
        checked = check(block.raw, stream, clock.read().wall_us, latest)
        if block.raw.t is not None and len(checked.rows):
            latest = int(checked.rows.t[-1])
        bad = block.bad | {block.lines[i]: reason for i, reason in checked.bad.items()}
        lines = [n for i, n in enumerate(block.lines) if i not in checked.bad]
        yield checked, lines, bad, max([*block.lines[-1:], *block.bad])


class _Socket:
    """Through the daemon. Its answers concern whole lines of ours: a refusal there is an error, not a rejected row."""

    def __init__(self, client: Client, stream: str, definition: Stream) -> None:
        self._client, self._stream, self._definition = client, stream, definition

    def put(self, checked: Checked, lines: list[int]) -> None:
        for start in range(0, len(checked.rows), _COLUMNS_A_LINE):
            part = checked.rows.slice(start, start + _COLUMNS_A_LINE)
            columns: dict[str, Any] = {"t": (part.t / 1e6).tolist()}
            for index, field in enumerate(self._definition.fields):
                if index in checked.categories:
                    texts = checked.categories[index][start : start + _COLUMNS_A_LINE]
                    columns[field.name] = [text or None for text in texts]
                else:
                    columns[field.name] = [None if v != v else v for v in part.columns[index].tolist()]
            self._client.send_columns(self._stream, columns)

    def finish(self) -> None:
        answer = self._client.flush()
        self._client.close()
        if answer.rejected:
            raise OutstationError(f"the daemon rejected rows it should take: {answer.rejected[0][1]}")


class _Direct:
    """Straight into the store."""

    def __init__(self, conf: Config, stream: str) -> None:
        self._store = wiring.open_store(conf)
        self._group, self._stream = Group(self._store, conf.streams), stream

    def put(self, checked: Checked, lines: list[int]) -> None:
        self._group.add(self, self._stream, checked, lines)
        if self._group.rows >= FULL_ROWS:
            self._commit()

    def finish(self) -> None:
        self._commit()
        self._store.close()

    def _commit(self) -> None:
        for outcome in self._group.commit(clock.read()).values():
            if outcome.full:
                raise OutstationError(outcome.rejected[0][1])


def _target(conf: Config, stream: str) -> Target:
    try:
        return _Direct(conf, stream)
    except StorageBusy:
        address = conf.data_dir / "intake.sock"
        try:
            return _Socket(Client(address), stream, conf.streams[stream])
        except OSError as error:
            raise OutstationError(
                f"{address}: another process holds the store, and it does not answer here ({error}); try again"
            ) from None


def _open(path: Path | None) -> IO[str]:
    if path is None:
        return sys.stdin
    try:
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


class _progress:
    """A line that counts up, for a person at a terminal and work of more than a second."""

    def __init__(self, path: Path | None) -> None:
        self._name = path.name if path else "stdin"
        self._began = clock.boot_seconds()
        self._shown = False

    def __enter__(self) -> Any:
        return self._show

    def __exit__(self, *_: object) -> None:
        if self._shown:
            click.echo("\r\x1b[K", nl=False, err=True)

    def _show(self, through: int) -> None:
        if sys.stderr.isatty() and clock.boot_seconds() - self._began > 1:
            self._shown = True
            click.echo(f"\r{self._name}: {through} lines", nl=False, err=True)


def _print(accepted: int, rejected: dict[int, str]) -> None:
    click.echo(f"{accepted} rows accepted, {len(rejected)} rejected")
    for line, reason in sorted(rejected.items())[:_SHOWN]:
        click.echo(f"  line {line}: {reason}")
    if len(rejected) > _SHOWN:
        click.echo(f"  … and {len(rejected) - _SHOWN} more; --json lists them all")
