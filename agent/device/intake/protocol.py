"""JSON lines of a producer to rows: whole runs of good lines in one decode, bad lines one by one with a reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import msgspec
import numpy as np

from agent.config import StreamConfig
from agent.device.intake import labels
from agent.device.intake.labels import LabelBatch
from agent.device.store.rows import RawColumns, ValidatedRows, validate_columns
from agent.errors import RowRejected
from agent.strict_json import DuplicateKey, check_key_count
from agent.toml_files import did_you_mean

MAX_LINE_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
# Nesting deep enough exhausts the decoder's stack before it is found to be no row.
_DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)


class ParsedLines(msgspec.Struct, frozen=True):
    """Rows of one stream out of one or more lines, None where a line held none.

    `lines` are the numbers of the lines the rows came in, one a row or one for all; `bad` line → reason.
    """

    stream: str
    checked: ValidatedRows | None
    lines: list[int]
    bad: dict[int, str]
    label_batch: LabelBatch | None = None


class _LineHead(msgspec.Struct):
    stream: str | msgspec.UnsetType = msgspec.UNSET
    labels: msgspec.Raw = msgspec.Raw()
    columns: msgspec.Raw = msgspec.Raw()
    packed: msgspec.Raw = msgspec.Raw()


class LineParser:
    """Parses the lines of one connection; remembers each stream's latest time in it.

    What becomes of a line depends on the lines before it, never on how they are cut into calls of `read`.
    """

    def __init__(self, streams: Mapping[str, StreamConfig]) -> None:
        self._decoders = {name: _StreamDecoder(name, stream) for name, stream in streams.items()}
        self._latest: dict[str, int] = {}
        self._likely_decoder: _StreamDecoder | None = None
        self._columnar_decoder: _StreamDecoder | None = None

    def parse(self, lines: list[bytes], first: int, now_us: int) -> Iterator[ParsedLines]:
        """What `lines`, numbered from `first`, hold; every line is in a Taken or in a `bad`."""
        run = self._parse_run(lines)
        if run is not None:
            yield self._check_rows(run[0], run[1], list(range(first, first + len(lines))), now_us)
            return
        if len(lines) > 32:
            # Halving finds a few bad lines among many good ones without decoding each line by itself.
            middle = len(lines) // 2
            yield from self.parse(lines[:middle], first, now_us)
            yield from self.parse(lines[middle:], first + middle, now_us)
            return
        for number, line in enumerate(lines, first):
            try:
                yield self._parse_line(line, number, now_us)
            except RowRejected as reason:
                yield ParsedLines("", None, [], {number: str(reason)})

    def _parse_run(self, lines: list[bytes]) -> tuple[_StreamDecoder, RawColumns] | None:
        """All lines as rows of the stream the last line was of, or None."""
        shape = self._likely_decoder
        if shape is None or len(lines) < 2:
            return None
        text = _to_json_array(lines)
        if text is None:
            return None
        try:
            decoded = shape.run_decoder.decode(text)
            return (shape, shape.transpose(decoded, text)) if len(decoded) == len(lines) else None
        except _DECODE_ERRORS:
            return None

    def _parse_line(self, line: bytes, number: int, now_us: int) -> ParsedLines:
        if len(line) > MAX_LINE_BYTES:
            raise RowRejected(f"line of {len(line)} bytes, the limit is {MAX_LINE_BYTES}; split it")
        if (shape := self._columnar_decoder) is not None and (found := shape.decode_columns(line)) is not None:
            return self._parse_columns(shape, found, line, number, now_us)
        try:
            named = msgspec.json.decode(line, type=_LineHead)
        except _DECODE_ERRORS as error:
            raise RowRejected(_explain_json_error(line, error)) from None
        if isinstance(named.stream, msgspec.UnsetType):
            return _parse_labels(line, number, named)
        shape = self._decoders.get(named.stream)
        if shape is None:
            raise RowRejected(f"unknown stream {named.stream[:40]!r}{did_you_mean(named.stream, self._decoders)}")
        if shape.stream.media_format is not None:
            raise RowRejected(f"stream {shape.name!r} takes whole files only; put them into its folder")
        by_columns = bool(bytes(named.columns)) or bool(bytes(named.packed))
        self._likely_decoder, self._columnar_decoder = (None, shape) if by_columns else (shape, None)
        try:
            if not by_columns:
                raw = shape.transpose([shape.row_decoder.decode(line)], line)
                return self._check_rows(shape, raw, [number], now_us)
            found = shape.columns_decoder.decode(line)
        except _DECODE_ERRORS as error:
            raise RowRejected(_explain_field_error(error, shape)) from None
        return self._parse_columns(shape, found, line, number, now_us)

    def _parse_columns(
        self, decoder: _StreamDecoder, decoded: Any, line: bytes, number: int, now_us: int
    ) -> ParsedLines:
        parts = [part for part in (decoded.columns, decoded.packed) if part is not msgspec.UNSET]
        values: dict[str, Any] = {} if decoded.columns is msgspec.UNSET else decoded.columns
        texts = chain.from_iterable(values.get(name, ()) for name in decoder.category_fields)
        try:
            check_key_count(line, 1 + len(parts) + sum(map(len, parts)), texts)
        except _DECODE_ERRORS as error:
            raise RowRejected(_explain_field_error(error, decoder)) from None
        for name, (kind, data) in () if decoded.packed is msgspec.UNSET else decoded.packed.items():
            if name in values:
                raise RowRejected(f"{name!r} is in columns and in packed; give it once")
            values[name] = decode_column(name, kind, data)
        t = values.pop("t", None)
        lengths = {len(column) for column in values.values()}
        if len(lengths) != 1 or lengths == {0}:
            raise RowRejected(f"columns must be of one length of at least 1, these have {sorted(lengths)}")
        raw = RawColumns(lengths.pop(), t, values)
        taken = self._check_rows(decoder, raw, [number], now_us)
        bad = taken.checked.rejected if taken.checked else {}
        if not bad:
            return taken
        shown = "; ".join(f"row {index + 1} of the columns: {reason}" for index, reason in sorted(bad.items())[:5])
        more = f"; and {len(bad) - 5} more rows" if len(bad) > 5 else ""
        return ParsedLines(taken.stream, taken.checked, [number], {number: shown + more})

    def _check_rows(self, decoder: _StreamDecoder, raw: RawColumns, numbers: list[int], now_us: int) -> ParsedLines:
        checked = validate_columns(raw, decoder.stream, now_us, self._latest.get(decoder.name))
        if checked.latest_us is not None:
            self._latest[decoder.name] = checked.latest_us
        if len(numbers) < raw.n:
            return ParsedLines(decoder.name, checked, numbers, {})
        bad = {numbers[index]: reason for index, reason in checked.rejected.items()}
        return ParsedLines(decoder.name, checked, [n for n in numbers if n not in bad], bad)


class _StreamDecoder:
    """The decoders of one stream."""

    def __init__(self, name: str, stream: StreamConfig) -> None:
        self.name, self.stream = name, stream
        self.category_fields = [f.name for f in stream.fields if f.type == "category"]

    @cached_property
    def _row_type(self) -> type[msgspec.Struct]:
        kinds: dict[str, Any] = {"category": str, "i64": int | float}
        absent = msgspec.UnsetType
        fields: list[Any] = [("stream", str), ("t", float | None | absent, msgspec.UNSET)]
        names = {}
        for index, f in enumerate(self.stream.fields):
            kind: Any = kinds.get(f.type, float)
            # Its own name could be one that Python gives a meaning to, as __init__.
            names[f"f{index}"] = f.name
            optional = (f"f{index}", kind | None | absent, msgspec.UNSET)
            fields.append(optional if f.optional else (f"f{index}", kind))
        return msgspec.defstruct("Row", fields, kw_only=True, forbid_unknown_fields=True, rename=names, gc=False)

    @cached_property
    def row_decoder(self) -> msgspec.json.Decoder[Any]:
        return msgspec.json.Decoder(self._row_type)

    @cached_property
    def run_decoder(self) -> msgspec.json.Decoder[Any]:
        return msgspec.json.Decoder(list[self._row_type])  # type: ignore[name-defined]

    @cached_property
    def columns_decoder(self) -> msgspec.json.Decoder[Any]:
        absent = msgspec.UnsetType
        fields: list[Any] = [("stream", str), ("columns", dict[str, list[Any]] | absent, msgspec.UNSET)]
        fields.append(("packed", dict[str, tuple[NumberType, bytes]] | absent, msgspec.UNSET))
        return msgspec.json.Decoder(msgspec.defstruct("Columnar", fields, forbid_unknown_fields=True))

    def decode_columns(self, line: bytes) -> Any:
        """The line as columns of this stream, decoded once; None where it is something else."""
        try:
            found = self.columns_decoder.decode(line)
        except _DECODE_ERRORS:
            return None
        is_other = found.stream != self.name or (found.columns is msgspec.UNSET and found.packed is msgspec.UNSET)
        return None if is_other else found

    def transpose(self, decoded: list[Any], text: bytes) -> RawColumns:
        """Rows that `text` was decoded to, as columns. Raises ValueError for rows of several streams, RepeatedKey."""
        names, times, *columns = zip(*map(msgspec.structs.astuple, decoded), strict=True)
        if names.count(self.name) != len(names):
            raise ValueError("lines of several streams")
        t, absent = _fill_absent(times)
        kept = (2 + len(columns)) * len(decoded) - absent
        values: dict[str, Any] = {}
        for f, column in zip(self.stream.fields, columns, strict=True):
            values[f.name], absent = _fill_absent(column) if f.optional else (column, 0)
            kept -= absent
        check_key_count(text, kept, chain.from_iterable(values[name] for name in self.category_fields))
        return RawColumns(len(decoded), t, values)


def _to_json_array(lines: list[bytes]) -> bytes | None:
    """The lines as one JSON array, or None where one of them is no object by its ends."""
    text = b"[" + b"\n,".join(lines) + b"]"
    # Rows are flat and no JSON string holds a newline, so that lines with these ends are objects of their own:
    # two halves of a row on two lines are not one row.
    if not (text.startswith(b"[{") and text.endswith(b"}]") and text.count(b"}\n,{") == len(lines) - 1):
        lines = [line.strip(b" \t\r") for line in lines]
        if not all(line.startswith(b"{") and line.endswith(b"}") for line in lines):
            return None
        text = b"[" + b"\n,".join(lines) + b"]"
    return text if len(text) <= MAX_LINE_BYTES or max(map(len, lines)) <= MAX_LINE_BYTES else None


def _parse_labels(line: bytes, number: int, head: _LineHead) -> ParsedLines:
    if not bytes(head.labels):
        raise RowRejected('no "stream" in this line')
    try:
        return ParsedLines("", None, [number], {}, labels.parse_line(line))
    except _DECODE_ERRORS as error:
        what, _, where = str(error)[:160].partition(" - at `$.")
        raise RowRejected(f"{where.rstrip('`')}: {what[:1].lower()}{what[1:]}" if where else what) from None


def _fill_absent(column: tuple[Any, ...]) -> tuple[Sequence[Any], int]:
    """The column with None where a row did not have the field, and how many did not."""
    absent = column.count(msgspec.UNSET)
    if not absent:
        return column, 0
    if absent == len(column):
        return [None] * absent, absent
    return [None if value is msgspec.UNSET else value for value in column], absent


def _explain_json_error(line: bytes, error: Exception) -> str:
    if line.startswith(_BOM):
        return "a byte order mark before the line; send UTF-8 without it"
    if b"\x00" in line or (not line.isascii() and not _is_text(line)):
        return "not text: binary data on a line protocol"
    if b"NaN" in line or b"Infinity" in line:
        return "NaN and Infinity are no JSON numbers; leave an optional field out instead"
    problem = str(error)
    return f"not one JSON object on one line: {problem[:120]}"


def _is_text(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _explain_field_error(error: Exception, decoder: _StreamDecoder) -> str:
    problem = str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"not text: {problem[:120]}"
    if isinstance(error, DuplicateKey):
        return problem
    names = [f.name for f in decoder.stream.fields]
    if "unknown field" in problem:
        name = problem.split("`")[1]
        return f"{name!r} is not a field of stream {decoder.name}{did_you_mean(name, names)}"
    if "missing required field" in problem:
        return f"field {problem.split('`')[1]!r} is missing"
    what, _, where = problem.partition(" - at `$.")
    return f"{where.rstrip('`')}: {what[:1].lower()}{what[1:]}" if where else problem[:160]


NumberType = Literal["f4", "f8", "i4", "i8"]


def decode_column(name: str, kind: NumberType, data: bytes) -> Any:
    """The values; where NaN is among them a list, in which it is None: a missing value. Raises Rejected."""
    width = int(kind[1])
    if len(data) % width:
        raise RowRejected(f"{name}: {len(data)} bytes are no {kind} values of {width} bytes")
    values = np.frombuffer(data, f"<{kind}")
    # The least is NaN where one is among them: one pass. NaN is no value that equals itself.
    if kind[0] == "f" and len(values) and (least := np.minimum.reduce(values)) != least:
        return [None if value != value else value for value in values.tolist()]
    return values
