"""`outstation ingest`: a file of readings into a stream."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import click

from agent import clock
from agent.bootstrap import wiring
from agent.cli.output import config_option, emit, json_option
from agent.client import Answer, Client
from agent.config import Config, FilesSource, Stream
from agent.device.intake.file_reader import Block, blocks, open_text
from agent.device.intake.group_commit import NOT_STORED, Group
from agent.device.machine.timekeeping import clock_of
from agent.device.store.rows import Checked, check
from agent.errors import ConfigError, OutstationError, Rejected, StorageBusy, UsageError
from agent.toml_files import suggestion

T = TypeVar("T")

_SHOWN = 20
_MOST_ROWS_A_LINE = 1024
_LINE_BYTES = 900_000


class Target(Protocol):
    """Where checked rows go."""

    def put(self, checked: Checked, lines: list[int]) -> None: ...

    def finish(self) -> tuple[int, dict[int, str]]:
        """Once all rows are safe: how many were accepted, and line → reason of what was not."""
        ...

    def close(self) -> None: ...


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
    if isinstance(source := conf.streams[stream].source, FilesSource) and source.made:
        raise UsageError(f"stream {stream!r} takes images or sounds from its folder: copy them to {source.folder}")
    accepted, rejected = _take(conf, stream, file)
    document = {"accepted": accepted, "rejected": [{"line": n, "reason": r} for n, r in sorted(rejected.items())]}
    emit(document, as_json, lambda: _print(accepted, rejected))
    if rejected:
        sys.exit(1)


def _take(conf: Config, name: str, file: str) -> tuple[int, dict[int, str]]:
    path = None if file == "-" else Path(file)
    rejected: dict[int, str] = {}
    stream = conf.streams[name]
    with contextlib.ExitStack() as open_files:
        text = open_files.enter_context(_open(path))
        target = open_files.enter_context(contextlib.closing(_target(conf, name)))
        bar = open_files.enter_context(_progress(path))
        problem = None
        try:
            for checked, lines, bad, through in _checked(blocks(path, text, name, stream), stream):
                rejected |= bad
                if len(checked.rows):
                    target.put(checked, lines)
                bar(through)
        except Rejected as found:
            problem = found
        # What was put is kept, whatever became of the rest: else a second try would take part of it twice.
        accepted, refused = target.finish()
        if problem is not None:
            kept = f"; {accepted} rows before that were accepted" if accepted else ""
            raise UsageError(f"{file}: {problem}{kept}")
    return accepted, rejected | refused


def _checked(found: Iterator[Block], stream: Stream) -> Iterator[tuple[Checked, list[int], dict[int, str], int]]:
    """Rows that are right, their line numbers, and the reason for each line that is not."""
    latest: int | None = None
    for block in found:
        checked = check(block.raw, stream, clock.read().wall_us, latest)
        latest = checked.latest
        bad = block.bad | {block.lines[i]: reason for i, reason in checked.bad.items()}
        lines = [n for i, n in enumerate(block.lines) if i not in checked.bad]
        yield checked, lines, bad, max([*block.lines[-1:], *block.bad])


class _Socket:
    """Through the daemon. Its answers concern lines of ours that hold many rows."""

    def __init__(self, client: Client, stream: str, definition: Stream) -> None:
        self._client, self._stream, self._definition = client, stream, definition
        # Of lines of ours that are not answered; of all of them they would outgrow everything else of a long file.
        self._lines: deque[list[int]] = deque()
        self._answered = 0
        self._accepted = 0
        self._refused: dict[int, str] = {}
        self._foreign = ""
        self._rows_a_line = max(1, min(_MOST_ROWS_A_LINE, _LINE_BYTES // _row_bytes(definition)))

    def put(self, checked: Checked, lines: list[int]) -> None:
        step = self._rows_a_line
        for start in range(0, len(checked.rows), step):
            part = checked.rows.slice(start, start + step)
            columns: dict[str, Any] = {"t": (part.t / 1e6).tolist()}
            for index, field in enumerate(self._definition.fields):
                if index in checked.categories:
                    texts = checked.categories[index][start : start + step]
                    columns[field.name] = [text or None for text in texts]
                else:
                    columns[field.name] = [None if v != v else v for v in part.columns[index].tolist()]
            self._lines.append(lines[start : start + step])
            self._told(lambda columns=columns: self._client.send_columns(self._stream, columns))  # type: ignore[misc]
            self._hear(self._client.answered())

    def finish(self) -> tuple[int, dict[int, str]]:
        self._hear(self._told(self._client.flush))
        if self._foreign:
            raise OutstationError(
                f"the daemon rejected rows that are right by this config: {self._foreign}; has the config changed "
                f"since the daemon was started? {self._accepted} rows were accepted"
            )
        return self._accepted, self._refused

    def close(self) -> None:
        self._client.close()

    def _hear(self, answer: Answer) -> None:
        self._accepted += answer.accepted
        for number, reason in answer.rejected:
            if reason.startswith(NOT_STORED):
                self._refused |= dict.fromkeys(self._lines[number - 1 - self._answered], reason)
            else:
                self._foreign = self._foreign or reason
        while self._answered < self._client.through:
            self._lines.popleft()
            self._answered += 1

    def _told(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except ConnectionError as error:
            first = self._client.through - self._answered
            sent = self._lines[first][0] if first < len(self._lines) else 0
            raise OutstationError(f"the daemon went away ({error}); all rows before line {sent} are safe") from None


class _Direct:
    """Straight into the store: no daemon runs."""

    def __init__(self, conf: Config, stream: str) -> None:
        self._store = wiring.open_store(conf)
        self._group, self._stream = Group(self._store, conf.streams), stream
        self._now = clock_of(self._store)
        self._accepted = 0
        self._refused: dict[int, str] = {}

    def put(self, checked: Checked, lines: list[int]) -> None:
        self._group.add(self, self._stream, checked, lines, self._now())
        if self._group.is_full:
            self._commit()

    def finish(self) -> tuple[int, dict[int, str]]:
        self._commit()
        return self._accepted, self._refused

    def close(self) -> None:
        self._store.close()

    def _commit(self) -> None:
        for outcome in self._group.commit(self._now()).values():
            self._accepted += outcome.accepted
            self._refused |= dict(outcome.rejected)


def _row_bytes(stream: Stream) -> int:
    """The most a row may take in a line of columns, names left out: 25 characters a number, 6 a character of text."""
    return 25 + sum(400 if field.type == "category" else 25 for field in stream.fields)


def _target(conf: Config, stream: str) -> Target:
    """The daemon first: whoever may use its socket need not be allowed to write its files."""
    address = conf.data_dir / "intake.sock"
    try:
        return _Socket(Client(address), stream, conf.streams[stream])
    except ConnectionError as error:
        try:
            return _Direct(conf, stream)
        except StorageBusy as busy:
            raise OutstationError(f"{busy}; it takes nothing in now: {error}") from None


def _open(path: Path | None) -> IO[str]:
    try:
        # Not sys.stdin, whose encoding hangs on the locale.
        return open_text(path if path is not None else 0)
    except OSError as error:
        raise UsageError(f"{path or 'stdin'}: {error.strerror}") from None


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
