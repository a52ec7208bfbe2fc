"""CSV in blocks of bytes: numbers are parsed in C; a block in which that fails is read line by line, for reasons."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from agent.datasets.blocks import MISSING, Block, Place, Rejected, Texts, require, times
from agent.errors import UsageError
from agent.model.inference.features import Floats

BLOCK = 4 << 20
_LONGEST = 64 << 20  # a row
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|inf(inity)?|nan)", re.IGNORECASE | re.ASCII)
_LONGEST_CELL = 64 << 10
_CLOSE = re.compile(rb'[^"]*(?:""[^"]*)*"(?!")')
_Parsed = tuple[list[NDArray[np.float64]], dict[str, Texts]]


class CsvFile:
    """The first line names the columns. An empty cell is a missing value; `t`, if there, is epoch seconds."""

    def __init__(self, path: Path, fields: Sequence[str], texts: Sequence[str] = (), block: int = BLOCK) -> None:
        """Raises UsageError."""
        self.path, self._block = path, block
        try:
            self.size = path.stat().st_size
            with path.open("rb") as file:
                first = file.readline(_LONGEST)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
        if not first.strip():
            raise UsageError(f"{path}: empty; the first line must name the columns")
        self._head = len(first)
        header = next(csv.reader([first.decode("utf-8-sig", "replace")]), [])
        self.columns = [name.strip() for name in header]
        self._fields, self._texts = list(fields), list(texts)
        require(path, self.columns, [*self._fields, *self._texts])
        self._timed = "t" in self.columns
        self._numbers = [*self._fields, *(["t"] if self._timed else [])]

    def done(self, place: Place) -> int:
        return place.offset

    def blocks(self, place: Place) -> Iterator[Block]:
        place = place if place.offset else Place(self._head, 1, 0, 0)
        try:
            with self.path.open("rb") as file:
                file.seek(place.offset)
                for content, tidy in self._pieces(file):
                    block = self._read(content, place, tidy)
                    place = block.after
                    yield block
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be read: {error.strerror or error}") from None

    def _pieces(self, file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
        """Whole lines, at most `block` bytes of them, and whether all quotation marks are round cells.

        From the start of a piece on, always the same pieces.
        """
        size, left, ended = self._block, b"", False
        while left or not ended:
            if len(left) < size and not ended:
                piece = file.read(size - len(left))
                left, ended = left + piece, not piece
            end, tidy = _whole_lines(left[:size], ended=ended and len(left) <= size)
            if end:
                yield left[:end], tidy
                size, left = self._block, left[end:]
            elif len(left) >= size:
                size *= 2
                if size > _LONGEST:
                    raise UsageError(f"{self.path}: a row longer than {_LONGEST >> 20} MiB; are these lines of text?")

    def _read(self, content: bytes, place: Place, tidy: bool) -> Block:
        rejected: list[Rejected] = []
        parsed = self._fast(content) if tidy else None
        if parsed is None:
            parsed, kept, count, rejected = self._slow(content, place)
            number = place.row + 1 + np.asarray(kept, np.int64)
        else:
            count = len(parsed[0][0])
            number = np.arange(place.row + 1, place.row + count + 1, dtype=np.int64)
        columns, texts = parsed
        t = times(columns[-1] if self._timed else None, number, place.t)
        lines = content.count(b"\n")
        after = Place(
            place.offset + len(content), place.line + lines, place.row + count, int(t[-1]) if len(t) else place.t
        )
        return Block(_matrix(columns[: len(self._fields)]), t, number, after, texts, rejected)

    def _fast(self, content: bytes) -> _Parsed | None:
        """None where a cell or a line is not what it should be."""
        try:
            import pyarrow as pa
            from pyarrow import csv as arrow
        except ImportError:
            return None if self._texts else self._loadtxt(content)
        # What is a number for the model may be a name for a slice: such a column is read as text first.
        types = dict.fromkeys(self._numbers, pa.float64()) | dict.fromkeys(self._texts, pa.string())
        read = arrow.ReadOptions(
            column_names=_distinct(self.columns), use_threads=False, block_size=max(len(content) + 1, 1024)
        )
        parse = arrow.ParseOptions(newlines_in_values=b'"' in content)
        convert = arrow.ConvertOptions(
            include_columns=list(types), column_types=types, null_values=list(MISSING), strings_can_be_null=False
        )
        try:
            table = arrow.read_csv(pa.py_buffer(content), read, parse, convert)
            numbers = [
                _numbers_of(table[name], pa) if name in self._texts else table[name].to_numpy()
                for name in self._numbers
            ]
        except pa.ArrowInvalid:
            return None
        return numbers, {name: np.asarray(table[name].to_pylist(), np.str_) for name in self._texts}

    def _loadtxt(self, content: bytes) -> _Parsed | None:
        """Without pyarrow; a block with a missing value is read line by line."""
        if b'"' in content:
            return None
        places = [self.columns.index(name) for name in self._numbers]
        try:
            table = np.loadtxt(io.BytesIO(content), np.float64, comments=None, delimiter=",", ndmin=2)
        except ValueError:
            return None
        if table.shape[1] != len(self.columns):
            return None
        return [table[:, place] for place in places], {}

    def _slow(self, content: bytes, place: Place) -> tuple[_Parsed, list[int], int, list[Rejected]]:
        """Line by line: (columns, which rows were taken, how many there are, what was rejected)."""
        lines = csv.reader(io.StringIO(content.decode("utf-8", "replace"), newline=""))
        places = [self.columns.index(name) for name in self._numbers]
        named = [self.columns.index(name) for name in self._texts]
        cells: list[list[float]] = []
        texts: list[list[str]] = []
        kept: list[int] = []
        rejected: list[Rejected] = []
        count = 0
        while True:
            first = place.line + lines.line_num + 1
            try:
                line = next(lines, None)
                if line is None:
                    break
                if not line:
                    continue
                if len(line) != len(self.columns):
                    raise ValueError(f"{len(line)} cells, the first line names {len(self.columns)}")
                cells.append([_number(line[i], self.columns[i]) for i in places])
                texts.append([line[i] for i in named])
                kept.append(count)
            except (ValueError, csv.Error) as error:
                rejected.append(Rejected(first, str(error)))
            count += 1
        table = np.array(cells, np.float64).reshape(len(kept), len(places))
        columns = np.array(texts, np.str_).reshape(len(kept), len(named))
        parsed = [table[:, i] for i in range(len(places))], {n: columns[:, i] for i, n in enumerate(self._texts)}
        return parsed, kept, count, rejected


def _number(text: str, name: str) -> float:
    text = text.strip()
    if text in MISSING:
        return np.nan
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{name}: {text[:40]!r} is no number")
    return float(text)


def _numbers_of(column: Any, pa: Any) -> Any:
    from pyarrow import compute

    missing = compute.is_in(column, value_set=pa.array(MISSING))
    return compute.if_else(missing, pa.scalar(None, pa.string()), column).cast(pa.float64()).to_numpy()


def _matrix(columns: Sequence[NDArray[np.float64]]) -> Floats:
    out = np.empty((len(columns[0]) if columns else 0, len(columns)), np.float32)
    with np.errstate(over="ignore"):
        for i, column in enumerate(columns):
            out[:, i] = column
    return out


def _distinct(names: Sequence[str]) -> list[str]:
    """Columns nobody asks for may share a name, or have none."""
    return [name if names.index(name) == i else f"{name} ({i})" for i, name in enumerate(names)]


def _whole_lines(content: bytes, *, ended: bool) -> tuple[int, bool]:
    """(end of the last line that is whole, whether all quotation marks are round cells); the file `ended` there or not.

    A quotation mark at the start of a cell that none closes is only a mistake of its line: the lines end with it, so
    that it swallows no more.
    """
    safe, at, round_cells = 0, 0, 0
    while (opened := _opening(content, at)) >= 0:
        first = opened + 1
        safe = content.rfind(b"\n", at, first) + 1 or safe
        closed = _CLOSE.match(content, first, first + _LONGEST_CELL)
        if closed is None:
            if not ended and len(content) - first < _LONGEST_CELL:
                return safe, _tidy(content, safe, round_cells)
            stray = content.find(b"\n", first) + 1
            return (stray or len(content)) if stray or ended else safe, False
        at = closed.end()
        round_cells += content.count(b'"', opened, at)
    safe = content.rfind(b"\n", at) + 1 or safe
    end = len(content) if ended else safe
    return end, _tidy(content, end, round_cells)


def _opening(content: bytes, at: int) -> int:
    """Where the next cell begins with a quotation mark; -1 without one."""
    while (found := content.find(b'"', at)) >= 0:
        if found == 0 or content[found - 1] in b",\n":
            return found
        at = found + 1
    return -1


def _tidy(content: bytes, end: int, round_cells: int) -> bool:
    return content.count(b'"', 0, end) == round_cells
