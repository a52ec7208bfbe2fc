"""Command `outstation ingest`: readings from a file into a stream."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
import numpy as np

from outstation.device.bootstrap import device
from outstation.device.config import Config, StreamConfig
from outstation.device.config.sources import FilesSource
from outstation.device.config.streams import NO_STREAM
from outstation.device.intake.connection import FILE_PREFIX, FILE_SOURCE, client_position
from outstation.device.intake.decode_process import DecodeProcess
from outstation.device.intake.file_digest import hash_file
from outstation.device.intake.file_reader import FileBlock, FileLayout
from outstation.device.intake.group_commit import NOT_STORED, GroupCommit
from outstation.device.intake.row_history import is_row_reason
from outstation.device.machine.timekeeping import make_clock
from outstation.device.store.rows import ValidatedRows, validate_columns
from outstation.foundation import clock
from outstation.foundation.cli.options import config_options
from outstation.foundation.cli.output import echo, emit, print_rejected
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import (
    ConfigError,
    OutstationError,
    RowRejected,
    StorageBusy,
    StorageFull,
    UsageError,
    explain,
)
from outstation.foundation.text import printable
from outstation.ml.datasets.formats import open_file
from outstation.protocol.client import Client, FlushResult

if TYPE_CHECKING:
    from outstation.ml.datasets.local_times import LocalTimes

_MAX_ROWS_PER_LINE = 1024
_MAX_LINE_BYTES = 900_000


@click.command(epilog="Example: outstation ingest watch readings.csv")
@click.argument("stream")
@click.argument("file", default="-")
@click.option("--map", "renamed", metavar="COLUMN=FIELD", multiple=True, help="Use COLUMN as the field FIELD.")
@click.option("--ignore", "ignored", metavar="COLUMN", multiple=True, help="Leave out COLUMN.")
@click.option(
    "--sep", "separator", metavar="C", help="Separator of the CSV file; default: found in its first line (, ; or tab)."
)
@click.option("--timezone", metavar="ZONE", help="Time zone of texts without one, such as Europe/Berlin.")
@config_options
def ingest(
    stream: str,
    file: str,
    renamed: tuple[str, ...],
    ignored: tuple[str, ...],
    separator: str | None,
    timezone: str | None,
    config_file: str | None,
    as_json: bool,
) -> None:
    """Add readings from FILE (- is stdin), which is CSV, JSON Lines or Parquet, to STREAM.

    Readings go through the running daemon, or into the store if none runs. The first line of a CSV file names its
    columns: the stream's fields, and optionally t (epoch seconds or RFC 3339). --map and --ignore make the columns of
    another program fit. With semicolons a number may have a decimal comma. Exit 1 if a row was rejected.

    A file that was added before is not added again, and one that was added in part is continued. A complete file is
    added again if it has rows without t, or if the stream has duplicates = "accept".
    """
    conf_file, conf = device.load_config(config_file)
    if stream not in conf.streams:
        raise ConfigError(
            str(conf_file), "streams", f"there is no stream {stream!r}{did_you_mean(stream, conf.streams, NO_STREAM)}"
        )
    if isinstance(source := conf.streams[stream].source, FilesSource) and source.media_format:
        raise UsageError(f"stream {stream!r} takes images or sounds from its folder: copy them to {source.folder}")
    layout = _parse_layout(conf.streams[stream], renamed, ignored, separator)
    times = None if timezone is None else _load_zone(timezone)
    accepted, rejected, handled_before = _ingest_file(conf, stream, file, layout, timezone, times)
    lines = [{"line": n, "reason": r} for n, r in sorted(rejected.items())]
    document = {"accepted": accepted, "rejected": lines, "handled_before": handled_before}

    def print_human() -> None:
        print_rejected(accepted, rejected, "row")
        if handled_before:
            echo(f"{handled_before} rows of this file were handled by an earlier run")

    emit(document, as_json, print_human, passed=not rejected)


def _parse_layout(
    stream: StreamConfig, renamed: Sequence[str], ignored: Sequence[str], separator: str | None
) -> FileLayout:
    """Return how the file differs from the stream. Raises UsageError."""
    names = [*(field.name for field in stream.fields), "t"]
    columns: dict[str, str] = {}
    for text in renamed:
        column, has_field, field = text.rpartition("=")
        if not has_field or not column:
            raise UsageError(f"--map {text!r}: write COLUMN=FIELD, such as temp_c=temperature")
        if field not in names:
            raise UsageError(f"--map {text!r}: the stream has no field {field!r}{did_you_mean(field, names)}")
        if column in columns or field in columns.values() or column in ignored:
            raise UsageError(f"--map {text!r}: this column or field is named twice; remove one")
        columns[column] = field
    mark = {"tab": "\t", "\\t": "\t"}.get(separator or "", separator or "")
    if len(mark.encode()) > 1 or mark in ('"', "\n", "\r", "."):
        raise UsageError(f"--sep {separator!r}: give one character, such as ; or tab")
    return FileLayout(columns, frozenset(ignored), mark)


def _load_zone(name: str) -> LocalTimes:
    # A few hundred kB that most calls do not need.
    from outstation.ml.datasets.local_times import LocalTimes

    return LocalTimes(name)


def _ingest_file(
    conf: Config, name: str, file: str, layout: FileLayout, zone: str | None, times: LocalTimes | None
) -> tuple[int, dict[int, str], int]:
    """Return the accepted rows, line → reason for rejected ones, and the rows that an earlier run handled."""
    path = None if file == "-" else Path(file)
    rejected: dict[int, str] = {}
    stream = conf.streams[name]
    with contextlib.ExitStack() as open_files:
        try:
            source = open_files.enter_context(open_file(path if path is not None else 0))
        except OSError as error:
            raise UsageError(f"{path or 'stdin'}: {explain(error)}") from None
        key = _file_key(source, name, stream, layout, zone)
        may_repeat = not _is_regular(source) or stream.duplicates == "accept"
        target = open_files.enter_context(contextlib.closing(_open_sink(conf, name, key)))
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
            blocks = _decode_blocks(process, source.fileno(), path.name if path is not None else "", layout)
            for checked, lines, bad, through in _check_blocks(conf, blocks, stream, times):
                rejected |= bad
                may_repeat = may_repeat or not np.all(checked.has_time)
                if len(checked.rows):
                    target.put(checked, lines)
                bar(through)
        except RowRejected as error:
            problem = error
        # Rows that were handed over stay, whatever happens to the rest: a second try would duplicate some otherwise.
        accepted, refused = target.finish()
        if problem is not None:
            partial = f"; {accepted} rows before that were accepted" if accepted else ""
            fits = str(problem).startswith("column ") and not str(problem).endswith("twice")
            hint = (
                "; --map COLUMN=FIELD renames a column, --ignore COLUMN leaves one out, --sep names the separator"
                if fits
                else ""
            )
            raise UsageError(f"{file}: {problem}{hint}{partial}")
        if may_repeat and target.is_complete:
            target.forget()
    return accepted, rejected | refused, target.handled_before


def _file_key(
    source: BufferedReader[Any], name: str, stream: StreamConfig, layout: FileLayout, zone: str | None
) -> str:
    """Return a client name by the content of the file and how it is read, or a new one for a pipe.

    Pieces number the rows that are valid. Whatever decides which ones are is part of the name.
    """
    if not _is_regular(source):
        return FILE_PREFIX + uuid.uuid4().hex
    reading = [name, stream.fields, layout.renamed, sorted(layout.ignored), layout.separator, zone]
    return FILE_PREFIX + hash_file(source.fileno(), msgspec.json.encode(reading))


def _is_regular(source: BufferedReader[Any]) -> bool:
    return stat.S_ISREG(os.fstat(source.fileno()).st_mode)


def _decode_blocks(process: DecodeProcess, source: int, name: str, layout: FileLayout) -> Iterator[FileBlock]:
    """Yield the blocks of a file. Raises RowRejected, whatever its decoder cannot do."""
    try:
        yield from process.decode(source, name, layout=layout)
    except UsageError as problem:
        raise RowRejected(str(problem)) from None
    except OSError as error:
        raise RowRejected(error.strerror or str(error)) from None


def _check_blocks(
    conf: Config, blocks: Iterator[FileBlock], stream: StreamConfig, times: LocalTimes | None
) -> Iterator[tuple[ValidatedRows, list[int], dict[int, str], int]]:
    """Yield valid rows, their line numbers, the reason for each invalid line, and the last line read."""
    latest: int | None = None
    for block in blocks:
        show_values, raw = conf.privacy.values_in_logs, block.raw
        if times is not None and isinstance(raw.t, list):
            raw = msgspec.structs.replace(raw, t=times.convert(raw.t))
        checked = validate_columns(raw, stream, clock.read().wall_us, latest, show_values=show_values)
        latest = checked.latest_us
        bad = block.rejected | {block.lines[i]: reason for i, reason in checked.rejected.items()}
        lines = [n for i, n in enumerate(block.lines) if i not in checked.rejected]
        yield checked, lines, bad, max([*block.lines[-1:], *block.rejected])


class RowSink(ABC):
    """Destination of checked rows, which go to it in numbered pieces: the daemon or the store.

    `handled_before`: rows of the first pieces, which an earlier run has stored, or which were rejected then.
    """

    def __init__(self, definition: StreamConfig, stored_pieces: int) -> None:
        self.handled_before = 0
        self._definition, self._stored_pieces, self._piece = definition, stored_pieces, 0
        # Depends on nothing but the stream, so that another run makes the same pieces.
        self._rows_per_piece = max(1, min(_MAX_ROWS_PER_LINE, _MAX_LINE_BYTES // _max_row_bytes(definition)))
        self._accepted = 0
        self._rejected: dict[int, str] = {}
        # After a piece that was not stored none may follow: another run continues at the first one that is missing.
        self._full_reason = ""

    def put(self, checked: ValidatedRows, lines: list[int]) -> None:
        step = self._rows_per_piece
        for start in range(0, len(checked.rows), step):
            numbers = lines[start : start + step]
            self._piece += 1
            if self._piece <= self._stored_pieces:
                self.handled_before += len(numbers)
            elif self._full_reason:
                self._rejected |= dict.fromkeys(numbers, self._full_reason)
            else:
                self._put_piece(checked.slice(start, start + step), numbers)

    @property
    def is_complete(self) -> bool:
        """True if no row has to be sent again."""
        return not self._full_reason

    @abstractmethod
    def _put_piece(self, piece: ValidatedRows, lines: list[int]) -> None: ...

    @abstractmethod
    def finish(self) -> tuple[int, dict[int, str]]:
        """Wait until all rows are stored; return the number accepted, and line → reason for the others."""

    @abstractmethod
    def forget(self) -> None:
        """Forget the pieces of a complete file: another one with the same content has other rows."""

    @abstractmethod
    def close(self) -> None: ...


class _DaemonSink(RowSink):
    """Sends rows to the daemon, a piece in a line; its answers are about these lines."""

    def __init__(self, address: Path, key: str, stream: str, definition: StreamConfig) -> None:
        self._address, self._key, self._stream = address, key, stream
        self._client = client = Client(address, name=key, reconnect=False)
        super().__init__(definition, client.through)
        # Of unanswered lines only: for all lines of a long file they would take more memory than all else.
        self._pending_lines: deque[list[int]] = deque()
        self._answered_lines = client.through
        self._unexpected_reason = ""

    def _put_piece(self, piece: ValidatedRows, lines: list[int]) -> None:
        columns: dict[str, Any] = {}
        if piece.has_time is not False:
            given = [True] * len(lines) if piece.has_time is True else piece.has_time.tolist()
            columns["t"] = [t if g else None for t, g in zip((piece.rows.t / 1e6).tolist(), given, strict=True)]
        for index, field in enumerate(self._definition.fields):
            if index in piece.categories:
                columns[field.name] = [text or None for text in piece.categories[index]]
            else:
                columns[field.name] = [None if v != v else v for v in piece.rows.columns[index].tolist()]
        self._pending_lines.append(lines)
        self._call_daemon(lambda: self._client.send_columns(self._stream, columns))
        self._record_answer(self._client.answered())

    def finish(self) -> tuple[int, dict[int, str]]:
        if not self._full_reason:
            self._call_daemon(lambda: self._record_answer(self._client.flush()))
        if self._unexpected_reason:
            raise OutstationError(
                f"the daemon rejected rows that are valid by this config: {self._unexpected_reason}; if the config "
                f"changed since the daemon was started, restart it. {self._accepted} rows were accepted"
            )
        return self._accepted, self._rejected

    def forget(self) -> None:
        try:
            forgotten = Client(self._address, name=self._key, reconnect=False, forget=True)
        except ConnectionError as error:
            raise OutstationError(
                f"the daemon went away ({error}) when all rows were stored; the next file with this content "
                "seems to be this one, and is not added"
            ) from None
        forgotten.close()

    def close(self) -> None:
        self._client.close()

    def _record_answer(self, answer: FlushResult) -> None:
        self._accepted += answer.accepted
        for number, reason in answer.rejected:
            lines = self._pending_lines[number - 1 - self._answered_lines]
            if reason.startswith(NOT_STORED):
                self._full_reason = reason
                self._rejected |= dict.fromkeys(lines, reason)
            elif is_row_reason(reason):
                self._rejected |= _split_reason(reason, lines)
            else:
                self._unexpected_reason = self._unexpected_reason or reason
        while self._answered_lines < self._client.through:
            self._pending_lines.popleft()
            self._answered_lines += 1
        if self._full_reason:
            # The daemon has closed the connection, and dropped what was under way.
            for lines in self._pending_lines:
                self._rejected |= dict.fromkeys(lines, self._full_reason)
            self._pending_lines.clear()

    def _call_daemon(self, action: Callable[[], object]) -> None:
        try:
            action()
        except ConnectionError as error:
            self._record_answer(self._client.answered())
            if self._full_reason:
                return
            sent = self._pending_lines[0][0] if self._pending_lines else 0
            raise OutstationError(
                f"the daemon went away ({error}); all rows before line {sent} are stored; run the same command again "
                "to add the rest of a file"
            ) from None
        else:
            self._record_answer(self._client.answered())


def _split_reason(reason: str, lines: list[int]) -> dict[int, str]:
    """Return line → reason from the daemon's one reason for a piece; `lines`: of the rows in the piece."""
    reasons: dict[int, str] = {}
    last = lines[0]
    for part in re.split(r"; (?=row \d+ of the columns: |and \d+ more rows$)", reason):
        if match := re.fullmatch(r"row (\d+) of the columns: (.*)", part, re.DOTALL):
            last = lines[int(match[1]) - 1]
            reasons[last] = match[2]
        else:
            reasons[last] = f"{reasons[last]}; {part} of lines {last} to {lines[-1]}" if last in reasons else part
    return reasons


class _StoreSink(RowSink):
    """Writes rows to the store, while no daemon runs."""

    def __init__(self, conf: Config, stream: str, key: str) -> None:
        self._store = device.open_store(conf)
        super().__init__(conf.streams[stream], self._store.source_position(FILE_SOURCE, key))
        self._group, self._stream, self._key = GroupCommit(self._store, conf.streams), stream, key
        self._now = make_clock(self._store)

    def _put_piece(self, piece: ValidatedRows, lines: list[int]) -> None:
        self._group.add_rows(self, self._stream, piece, lines, self._now(), is_recording=True)
        self._group.advance(self, self._piece, client_position(self._key, self._piece))
        if self._group.is_full:
            self._commit()

    def finish(self) -> tuple[int, dict[int, str]]:
        self._commit()
        return self._accepted, self._rejected

    def forget(self) -> None:
        with contextlib.suppress(StorageFull), self._store.transaction() as tx:
            tx.delete_source_position(FILE_SOURCE, self._key)

    def close(self) -> None:
        self._store.close()

    def _commit(self) -> None:
        for outcome in self._group.commit(self._now()).values():
            self._accepted += outcome.accepted
            self._rejected |= dict(outcome.rejected)
            if outcome.is_store_full:
                self._full_reason = outcome.rejected[-1][1]


def _max_row_bytes(stream: StreamConfig) -> int:
    """Return the largest size of a row in a line of columns: 25 bytes a number, 6 bytes a character of text."""
    return 25 + sum(400 if field.type == "category" else 25 for field in stream.fields)


def _open_sink(conf: Config, stream: str, key: str) -> RowSink:
    """Open the daemon's socket, or else the store: a user of the socket may have no right to write the store."""
    address = conf.data_dir / "intake.sock"
    try:
        return _DaemonSink(address, key, stream, conf.streams[stream])
    except ConnectionError as error:
        try:
            return _StoreSink(conf, stream, key)
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
