"""Command `outstation ingest`: readings from a file into a stream."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click

from agent import clock
from agent.bootstrap import device
from agent.cli.output import config_option, emit, json_option, print_rejected
from agent.client import Client, FlushResult
from agent.config import Config, StreamConfig
from agent.config.sources import FilesSource
from agent.datasets.formats import open_file
from agent.device.intake.decode_process import DecodeProcess
from agent.device.intake.file_reader import FileBlock
from agent.device.intake.group_commit import NOT_STORED, GroupCommit
from agent.device.machine.timekeeping import make_clock
from agent.device.store.rows import ValidatedRows, validate_columns
from agent.errors import ConfigError, OutstationError, RowRejected, StorageBusy, UsageError
from agent.text import printable
from agent.toml_files import did_you_mean

T = TypeVar("T")

_MAX_ROWS_PER_LINE = 1024
_MAX_LINE_BYTES = 900_000


class RowSink(Protocol):
    """Destination of checked rows: the daemon or the store."""

    def put(self, checked: ValidatedRows, lines: list[int]) -> None: ...

    def finish(self) -> tuple[int, dict[int, str]]:
        """Wait until all rows are stored; return the number accepted, and line → reason for the others."""
        ...

    def close(self) -> None: ...


@click.command(epilog="Example: outstation ingest watch readings.csv")
@click.argument("stream")
@click.argument("file", default="-")
@config_option
@json_option
def ingest(stream: str, file: str, config_file: str | None, as_json: bool) -> None:
    """Add readings from FILE (- is stdin), which is CSV, JSON Lines or Parquet, to STREAM.

    Readings go through the running daemon, or into the store if none runs. The first line of a CSV file names its
    columns: the stream's fields, and optionally t (epoch seconds or RFC 3339). Exit 1 if a row was rejected.
    """
    conf_file, conf = device.load_config(config_file)
    if stream not in conf.streams:
        raise ConfigError(
            str(conf_file), "streams", f"there is no stream {stream!r}{did_you_mean(stream, conf.streams)}"
        )
    if isinstance(source := conf.streams[stream].source, FilesSource) and source.media_format:
        raise UsageError(f"stream {stream!r} takes images or sounds from its folder: copy them to {source.folder}")
    accepted, rejected = _ingest_file(conf, stream, file)
    document = {"accepted": accepted, "rejected": [{"line": n, "reason": r} for n, r in sorted(rejected.items())]}
    emit(document, as_json, lambda: print_rejected(accepted, rejected, "rows"))
    if rejected:
        sys.exit(1)


def _ingest_file(conf: Config, name: str, file: str) -> tuple[int, dict[int, str]]:
    path = None if file == "-" else Path(file)
    rejected: dict[int, str] = {}
    stream = conf.streams[name]
    with contextlib.ExitStack() as open_files:
        try:
            source = open_files.enter_context(open_file(path if path is not None else 0))
        except OSError as error:
            raise UsageError(f"{path or 'stdin'}: {error.strerror}") from None
        target = open_files.enter_context(contextlib.closing(_open_sink(conf, name)))
        process = DecodeProcess(
            *(name, stream),
            show_values=conf.privacy.values_in_logs,
            must_be_confined=conf.models.confinement == "required",
            answer_timeout_s=None,
        )
        open_files.enter_context(contextlib.closing(process))
        bar = open_files.enter_context(_ProgressLine(path))
        problem = None
        try:
            blocks = _decode_blocks(process, source.fileno(), path.name if path is not None else "")
            for checked, lines, bad, through in _check_blocks(conf, blocks, stream):
                rejected |= bad
                if len(checked.rows):
                    target.put(checked, lines)
                bar(through)
        except RowRejected as error:
            problem = error
        # Rows that were handed over stay, whatever happens to the rest: a second try would duplicate some otherwise.
        accepted, refused = target.finish()
        if problem is not None:
            partial = f"; {accepted} rows before that were accepted" if accepted else ""
            raise UsageError(f"{file}: {problem}{partial}")
    return accepted, rejected | refused


def _decode_blocks(process: DecodeProcess, source: int, name: str) -> Iterator[FileBlock]:
    """Yield the blocks of a file. Raises RowRejected, whatever its decoder cannot do."""
    try:
        yield from process.decode(source, name)
    except UsageError as problem:
        raise RowRejected(str(problem)) from None
    except OSError as error:
        raise RowRejected(error.strerror or str(error)) from None


def _check_blocks(
    conf: Config, blocks: Iterator[FileBlock], stream: StreamConfig
) -> Iterator[tuple[ValidatedRows, list[int], dict[int, str], int]]:
    """Yield valid rows, their line numbers, the reason for each invalid line, and the last line read."""
    latest: int | None = None
    for block in blocks:
        show_values = conf.privacy.values_in_logs
        checked = validate_columns(block.raw, stream, clock.read().wall_us, latest, show_values=show_values)
        latest = checked.latest_us
        bad = block.rejected | {block.lines[i]: reason for i, reason in checked.rejected.items()}
        lines = [n for i, n in enumerate(block.lines) if i not in checked.rejected]
        yield checked, lines, bad, max([*block.lines[-1:], *block.rejected])


class _DaemonSink:
    """Sends rows to the daemon, many in a line; its answers are about these lines."""

    def __init__(self, client: Client, stream: str, definition: StreamConfig) -> None:
        self._client, self._stream, self._definition = client, stream, definition
        # Of unanswered lines only: for all lines of a long file they would take more memory than all else.
        self._pending_lines: deque[list[int]] = deque()
        self._answered_lines = 0
        self._accepted = 0
        self._rejected: dict[int, str] = {}
        self._unexpected_reason = ""
        self._rows_per_line = max(1, min(_MAX_ROWS_PER_LINE, _MAX_LINE_BYTES // _max_row_bytes(definition)))

    def put(self, checked: ValidatedRows, lines: list[int]) -> None:
        step = self._rows_per_line
        for start in range(0, len(checked.rows), step):
            part = checked.rows.slice(start, start + step)
            columns: dict[str, Any] = {"t": (part.t / 1e6).tolist()}
            for index, field in enumerate(self._definition.fields):
                if index in checked.categories:
                    texts = checked.categories[index][start : start + step]
                    columns[field.name] = [text or None for text in texts]
                else:
                    columns[field.name] = [None if v != v else v for v in part.columns[index].tolist()]
            self._pending_lines.append(lines[start : start + step])
            self._call_daemon(lambda columns=columns: self._client.send_columns(self._stream, columns))  # type: ignore[misc]
            self._record_answer(self._client.answered())

    def finish(self) -> tuple[int, dict[int, str]]:
        self._record_answer(self._call_daemon(self._client.flush))
        if self._unexpected_reason:
            raise OutstationError(
                f"the daemon rejected rows that are valid by this config: {self._unexpected_reason}; if the config "
                f"changed since the daemon was started, restart it. {self._accepted} rows were accepted"
            )
        return self._accepted, self._rejected

    def close(self) -> None:
        self._client.close()

    def _record_answer(self, answer: FlushResult) -> None:
        self._accepted += answer.accepted
        for number, reason in answer.rejected:
            if reason.startswith(NOT_STORED):
                self._rejected |= dict.fromkeys(self._pending_lines[number - 1 - self._answered_lines], reason)
            else:
                self._unexpected_reason = self._unexpected_reason or reason
        while self._answered_lines < self._client.through:
            self._pending_lines.popleft()
            self._answered_lines += 1

    def _call_daemon(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except ConnectionError as error:
            first = self._client.through - self._answered_lines
            sent = self._pending_lines[first][0] if first < len(self._pending_lines) else 0
            raise OutstationError(f"the daemon went away ({error}); all rows before line {sent} are stored") from None


class _StoreSink:
    """Writes rows to the store, while no daemon runs."""

    def __init__(self, conf: Config, stream: str) -> None:
        self._store = device.open_store(conf)
        self._group, self._stream = GroupCommit(self._store, conf.streams), stream
        self._now = make_clock(self._store)
        self._accepted = 0
        self._rejected: dict[int, str] = {}

    def put(self, checked: ValidatedRows, lines: list[int]) -> None:
        self._group.add_rows(self, self._stream, checked, lines, self._now())
        if self._group.is_full:
            self._commit()

    def finish(self) -> tuple[int, dict[int, str]]:
        self._commit()
        return self._accepted, self._rejected

    def close(self) -> None:
        self._store.close()

    def _commit(self) -> None:
        for outcome in self._group.commit(self._now()).values():
            self._accepted += outcome.accepted
            self._rejected |= dict(outcome.rejected)


def _max_row_bytes(stream: StreamConfig) -> int:
    """Return the largest size of a row in a line of columns: 25 bytes a number, 6 bytes a character of text."""
    return 25 + sum(400 if field.type == "category" else 25 for field in stream.fields)


def _open_sink(conf: Config, stream: str) -> RowSink:
    """Open the daemon's socket, or else the store: a user of the socket may have no right to write the store."""
    address = conf.data_dir / "intake.sock"
    try:
        return _DaemonSink(Client(address), stream, conf.streams[stream])
    except ConnectionError as error:
        try:
            return _StoreSink(conf, stream)
        except StorageBusy as busy:
            raise OutstationError(f"{busy}; the daemon takes no rows now: {error}") from None


class _ProgressLine:
    """Progress line on a terminal, after the first second."""

    def __init__(self, path: Path | None) -> None:
        self._name = path.name if path else "stdin"
        self._started_s = clock.boot_seconds()
        self._shown = False

    def __enter__(self) -> Any:
        return self._show

    def __exit__(self, *_: object) -> None:
        if self._shown:
            click.echo("\r\x1b[K", nl=False, err=True)

    def _show(self, through: int) -> None:
        if sys.stderr.isatty() and clock.boot_seconds() - self._started_s > 1:
            self._shown = True
            click.echo(f"\r{printable(self._name)}: {through} lines", nl=False, err=True)
