"""Sensor program as a stream: a child process that prints a row on each line, started again when it ends.

A program is held back at its pipe while it prints faster than the source allows, or while the store is full. It is
killed and started again when it prints nothing for too long. When the daemon stops, the program ends first, and what it
has printed is stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import logging
import shutil
import stat
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from outstation.device.config import FieldConfig, StreamConfig
from outstation.device.config.sources import ExecSource
from outstation.device.intake.source import SourceContext, SubmitRows
from outstation.device.intake.sources.program import LongLine, Program
from outstation.device.store.rows import RawColumns
from outstation.device.store.store import Store
from outstation.foundation import decoders
from outstation.foundation.backoff import Backoff
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import ConfigError, StorageFull
from outstation.foundation.strict_json import check_key_count
from outstation.foundation.text import printable
from outstation.ml.datasets.tables import ColumnType, keep_invalid_values, time_or_value

log = logging.getLogger("outstation.exec")

RESTART_COUNTER, SILENCE_COUNTER, FLOOD_COUNTER = "program restarts", "program silent", "program held back"
LOSS_COUNTER = "program lines lost"
_RESTART = Backoff(1.0, 60.0)
# A program that ran for this long failed for a new reason: it is started again at once.
_STEADY_S = 60.0
_FULL_RETRY_S = 1.0
_MAX_WAITING_LINES = 10_000
_MAX_WAITING_BYTES = 1 << 20
# Times to read and to store what a stopped program has printed; with its end, less than the intake waits for a source.
_READ_REST_S, _STORE_REST_S = 0.5, 1.0
# A burst of this length is no flood.
_BURST_S = 5.0
_LOG_LINES, _LOG_WINDOW_S = 20, 60.0
_MAX_LOG_CHARS = 300
_COLUMN_TYPES = {"category": ColumnType.TEXT, "i64": ColumnType.INTEGER}


def check(context: SourceContext, source: ExecSource) -> str:
    """Describe the source. Raises ConfigError if the program is missing, or other users could replace it."""
    key, name = f"streams.{context.name}.source.command", source.command[0]
    program = shutil.which(name)
    if program is None:
        raise ConfigError(context.file, key, f"{name}: no such program, or not executable; give its path")
    # The script of an interpreter counts, too.
    folder = Path(context.file).resolve().parent
    for part in (Path(program), *(folder / argument for argument in source.command[1:])):
        with contextlib.suppress(OSError, ValueError):
            status = part.stat()
            if stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IWOTH:
                problem = f"{part}: everybody may change what the daemon runs; `chmod o-w {part}`"
                raise ConfigError(context.file, key, problem)
    every = f", every {float(source.every):g} s" if source.every is not None else ""
    return f"lines of {' '.join(source.command)[:80]}{every}"


def build(context: SourceContext, source: ExecSource, store: Store) -> ProgramReader:
    check(context, source)
    return ProgramReader(context.name, context.stream, source, store, Path(context.file).resolve().parent)


class ProgramReader:
    """Reader of a program's lines; the program runs in `folder`."""

    def __init__(self, name: str, stream: StreamConfig, source: ExecSource, store: Store, folder: Path) -> None:
        self._name, self._stream, self._source, self._store, self._folder = name, stream, source, store, folder
        self._parser = _RowParser(stream.fields, is_csv=source.format == "csv")
        self._log = _LimitedLog(name)
        self._budget = float(source.max_rate) * _BURST_S
        self._budget_s = 0.0
        self._is_stopping = asyncio.Event()

    async def run(self, submit_rows: SubmitRows) -> None:
        loop, failures = asyncio.get_running_loop(), 0
        while True:
            begin = loop.time()
            problem = await self._run_program(submit_rows)
            if not problem and self._source.every is not None:
                failures = 0
                await asyncio.sleep(max(0.0, begin + float(self._source.every) - loop.time()))
                continue
            failures = 1 if loop.time() - begin >= _STEADY_S else failures + 1
            delay = _RESTART.wait_s(failures)
            problem = problem or "it ended; a program that ends on purpose needs `every`"
            self._log.warn(f"{problem}; started again in {delay:g} s")
            self._count(RESTART_COUNTER)
            await asyncio.sleep(delay)

    async def _run_program(self, submit_rows: SubmitRows) -> str:
        """Run the program to its end; return why it has to be started again, "" if it succeeded."""
        self._parser.begin()
        try:
            program = Program(self._source.command, self._folder, self._log_error_line)
        except OSError as error:
            return f"not started: {error.strerror}"
        lines = _WaitingLines()
        submitting = asyncio.create_task(self._submit_lines(lines, submit_rows))
        reading = asyncio.create_task(self._read_program(program, lines))
        try:
            await asyncio.wait([submitting, reading], return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                # Only an error ends it before the program.
                submitting.result()
            problem = reading.result()
            lines.end()
            # Not cancelled with this task.
            await asyncio.wait([submitting])
            submitting.result()
        except asyncio.CancelledError:
            self._is_stopping.set()
            await program.stop()
            await asyncio.wait([reading], timeout=_READ_REST_S)
            lines.end()
            await asyncio.wait([submitting], timeout=_STORE_REST_S)
            if lines.unstored:
                self._log.warn(f"{lines.unstored} lines are lost: the daemon stopped before it could store them")
                self._count(LOSS_COUNTER, lines.unstored)
            raise
        finally:
            for task in (submitting, reading):
                task.cancel()
            ending = await program.close()
        return problem or (ending and f"it ended with {ending}")

    def _log_error_line(self, text: str) -> None:
        # Only the program knows what its text says.
        if self._stream.has_protected_fields:
            self._log.warn("its error text is left out, as the stream has protected fields", once=True)
        else:
            self._log.warn(text)

    async def _read_program(self, program: Program, lines: _WaitingLines) -> str:
        timeout_s = float(self._source.timeout) or None
        try:
            async for batch in program.read_lines(timeout_s):
                await lines.put(batch)
                await self._hold_back(len(batch))
        except TimeoutError:
            self._count(SILENCE_COUNTER)
            return f"it printed nothing for {timeout_s:g} s, and was killed"
        return ""

    async def _hold_back(self, line_count: int) -> None:
        """Wait until the lines are within `max_rate`."""
        now, rate = asyncio.get_running_loop().time(), float(self._source.max_rate)
        self._budget = min(rate * _BURST_S, self._budget + (now - self._budget_s) * rate) - line_count
        self._budget_s = now
        if self._budget < 0 and not self._is_stopping.is_set():
            self._log.warn(f"it prints more than {rate:g} lines a second (max_rate) and is held back", once=True)
            self._count(FLOOD_COUNTER)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(-self._budget / rate, 60.0) + _BURST_S / 2):
                    await self._is_stopping.wait()

    async def _submit_lines(self, waiting: _WaitingLines, submit_rows: SubmitRows) -> None:
        while lines := await waiting.take_all():
            raw, numbers, refused = self._parser.parse(lines)
            if not numbers and not refused:
                # The line that names the columns came alone.
                continue
            while (outcome := await submit_rows(self._name, raw, None, numbers, refused)).is_store_full:
                await asyncio.sleep(_FULL_RETRY_S)
            if outcome.rejected:
                # A line that is no row may hold anything.
                reason = "a line is no row" if self._stream.has_protected_fields else outcome.rejected[0][1]
                self._log.warn(f"not stored: {reason}", once=True)

    def _count(self, counter: str, count: int = 1) -> None:
        with contextlib.suppress(StorageFull), self._store.transaction() as tx:
            tx.increment_counter(f"{counter}.{self._name}", count)


class _WaitingLines:
    """Lines that wait for the commit before them, bounded in count and bytes."""

    def __init__(self) -> None:
        self._lines: deque[bytes | LongLine] = deque()
        self._bytes, self._taken, self._is_ended = 0, 0, False
        self._changed = asyncio.Event()

    async def put(self, lines: Sequence[bytes | LongLine]) -> None:
        """Add lines, once there is room."""
        while self._bytes > _MAX_WAITING_BYTES or len(self._lines) > _MAX_WAITING_LINES:
            self._changed.clear()
            await self._changed.wait()
        self._lines.extend(lines)
        self._bytes += sum(len(line) for line in lines if isinstance(line, bytes))
        self._changed.set()

    async def take_all(self) -> list[bytes | LongLine]:
        """Return all that wait, at least one; none after the end. Those taken before are stored."""
        self._taken = 0
        while not self._lines and not self._is_ended:
            self._changed.clear()
            await self._changed.wait()
        lines = list(self._lines)
        self._taken = len(lines)
        self._lines.clear()
        self._bytes = 0
        self._changed.set()
        return lines

    @property
    def unstored(self) -> int:
        return len(self._lines) + self._taken

    def end(self) -> None:
        self._is_ended = True
        self._changed.set()


class _RowParser:
    """Rows of a stream from JSON objects, or from CSV whose first line names the columns."""

    def __init__(self, fields: Sequence[FieldConfig], *, is_csv: bool) -> None:
        self._fields, self._is_csv = fields, is_csv
        self._known = [*(field.name for field in fields), "t"]
        self._columns: list[str] | None = None
        self._decoder = decoders.json_decoder(dict[str, Any])

    def begin(self) -> None:
        """Expect the first line of a program."""
        self._columns = None

    def parse(self, lines: Sequence[bytes | LongLine]) -> tuple[RawColumns, list[int], dict[int, str]]:
        """Return the rows, the number of each one's line, and the reason for each line that is none."""
        rows: list[dict[str, Any]] = []
        numbers: list[int] = []
        refused: dict[int, str] = {}
        for number, line in enumerate(lines, 1):
            try:
                row = self._parse_line(line)
            except (msgspec.MsgspecError, ValueError, RecursionError, csv.Error) as error:
                refused[number] = printable(str(error))[:_MAX_LOG_CHARS]
                continue
            if row is not None:
                rows.append(row)
                numbers.append(number)
        values: dict[str, Any] = {}
        for field in self._fields:
            column = [row.get(field.name) for row in rows]
            if self._is_csv:
                kind = _COLUMN_TYPES.get(field.type, ColumnType.FLOAT)
                column = keep_invalid_values([cell or "" for cell in column], kind)
            values[field.name] = column
        t = None
        if any("t" in row for row in rows):
            # An empty cell of CSV is no time; any other text that is none is rejected.
            t = [None if self._is_csv and not row.get("t") else time_or_value(row.get("t")) for row in rows]
        return RawColumns(len(rows), t, values), numbers, refused

    def _parse_line(self, line: bytes | LongLine) -> dict[str, Any] | None:
        """Return a row; None for the line that names the columns. Raises ValueError, csv.Error, MsgspecError."""
        if isinstance(line, LongLine):
            raise line
        if not self._is_csv:
            row = self._decoder.decode(line)
            check_key_count(line, len(row), row.values())
            self._check_names(row)
            return row
        cells = next(csv.reader([line.decode("utf-8").rstrip("\r")], strict=True))
        if self._columns is None:
            names = [cell.strip() for cell in cells]
            self._check_names(names)
            if len(set(names)) < len(names):
                raise ValueError("the first line names a column twice")
            self._columns = names
            return None
        if len(cells) != len(self._columns):
            raise ValueError(f"{len(cells)} values, the first line names {len(self._columns)}")
        return dict(zip(self._columns, cells, strict=True))

    def _check_names(self, names: Sequence[str] | dict[str, Any]) -> None:
        for name in names:
            if name not in self._known:
                raise ValueError(f"{name[:40]!r} is not a field of this stream{did_you_mean(name, self._known)}")


class _LimitedLog:
    """Log of one program: at most 20 lines a minute, each shortened and printable; the others are counted."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._window_s, self._lines, self._left_out = float("-inf"), 0, 0
        self._logged_once: set[str] = set()

    def warn(self, text: str, *, once: bool = False) -> None:
        """Log `text`; with `once` not again within a minute."""
        now = asyncio.get_running_loop().time()
        if now - self._window_s >= _LOG_WINDOW_S:
            if self._left_out:
                log.warning("%s: %d more lines were left out", self._name, self._left_out)
            self._window_s, self._lines, self._left_out = now, 0, 0
            self._logged_once.clear()
        if once and text in self._logged_once:
            return
        if self._lines >= _LOG_LINES:
            self._left_out += 1
            return
        self._lines += 1
        self._logged_once.add(text)
        log.warning("%s: %s", self._name, printable(text)[:_MAX_LOG_CHARS])
