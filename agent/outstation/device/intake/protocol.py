"""Intake protocol: JSON lines and frames to validated rows. Runs of valid lines are decoded at once.

The protocol is described in `docs/reference/intake.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import msgspec

from outstation.device.config import StreamConfig
from outstation.device.config.streams import NO_STREAM
from outstation.device.intake import frames, label_intake
from outstation.device.intake.frames import FrameLayout, Frames, NumberType, decode_column
from outstation.device.intake.label_intake import LabelBatch
from outstation.device.intake.row_history import summarize_reasons
from outstation.device.store.rows import BlockLimits, RawColumns, ValidatedRows, validate_columns
from outstation.foundation import decoders
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import RowRejected
from outstation.foundation.strict_json import DuplicateKey, check_key_count

MAX_LINE_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
# Deep nesting exhausts the decoder's stack.
_DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)


class ParsedLines(msgspec.Struct, frozen=True):
    """Rows of one stream from one or more lines, or None; `rejected`: line → reason.

    `lines` are the line numbers of the rows: one per row, one for all, or one for each frame of as many rows.
    """

    stream: str
    validated: ValidatedRows | None
    lines: list[int]
    rejected: dict[int, str]
    label_batch: LabelBatch | None = None


class _LineHead(msgspec.Struct):
    stream: str | msgspec.UnsetType = msgspec.UNSET
    labels: msgspec.Raw = msgspec.Raw()
    columns: msgspec.Raw = msgspec.Raw()
    packed: msgspec.Raw = msgspec.Raw()


class LineParser:
    """Parser of one connection's lines, with the latest time of each stream.

    The result of a line depends on the lines before it, never on how they are split between calls of `parse`. Reasons
    of rejected lines name values only with `show_values`.
    """

    def __init__(self, streams: Mapping[str, StreamConfig], *, show_values: bool = False) -> None:
        self._show_values = show_values
        self._decoders = {name: _StreamDecoder(name, stream) for name, stream in streams.items()}
        self._latest: dict[str, int] = {}
        self._likely_decoder: _StreamDecoder | None = None
        self._columnar_decoder: _StreamDecoder | None = None
        self._frame_layout: FrameLayout | None = None

    def forget_times(self) -> None:
        """Accept any times next: rows that were not stored come again."""
        self._latest.clear()

    def parse(self, lines: list[bytes], first: int, now_us: int) -> Iterator[ParsedLines]:
        """Parse `lines`, numbered from `first`; every line is among the `lines` or the `rejected` of a result."""
        run = self._parse_run(lines)
        if run is not None:
            yield self._validate(run[0], run[1], list(range(first, first + len(lines))), now_us)
            return
        if len(lines) > 32:
            # Bisection finds a few invalid lines among many valid ones without decoding each line by itself.
            middle = len(lines) // 2
            yield from self.parse(lines[:middle], first, now_us)
            yield from self.parse(lines[middle:], first + middle, now_us)
            return
        for number, line in enumerate(lines, first):
            try:
                yield self._parse_line(line, number, now_us)
            except RowRejected as reason:
                yield ParsedLines("", None, [], {number: str(reason)})

    def parse_frames(self, received: Frames, first: int, now_us: int) -> list[ParsedLines]:
        """Parse whole binary frames, which count as lines from `first` on."""
        numbers = range(first, first + len(received))
        if len(numbers) > 1 and (together := self._parse_together(received, list(numbers), now_us)) is not None:
            return [together]
        return [self._parse_frame(frame, number, now_us) for frame, number in zip(received, numbers, strict=True)]

    def _parse_together(self, received: Frames, numbers: list[int], now_us: int) -> ParsedLines | None:
        """Parse frames with the same head as one, which is much cheaper; None if a row or a frame is invalid."""
        try:
            decoder, raw = self._decode_frames(received)
            validated = self._validate_columns(decoder, raw, now_us)
        except RowRejected:
            return None
        if validated.rejected:
            return None
        self._advance_time(decoder, validated)
        return ParsedLines(decoder.name, validated, numbers, {})

    def _parse_frame(self, frame: Frames, number: int, now_us: int) -> ParsedLines:
        try:
            decoder, raw = self._decode_frames(frame)
            return self._validate_block(decoder, raw, number, now_us)
        except RowRejected as reason:
            return ParsedLines("", None, [], {number: str(reason)})

    def _decode_frames(self, received: Frames) -> tuple[_StreamDecoder, RawColumns]:
        self._frame_layout = layout = frames.read_layout(received, self._frame_layout)
        decoder = self._find_decoder(layout.stream)
        columns = frames.read_columns(received, layout)
        values: dict[str, Any] = columns.values
        for name in decoder.integer_fields & values.keys():
            values[name] = frames.nan_to_none(values[name])
        raw = RawColumns(columns.n, columns.t_us, values, nan_is_missing=True, t_in_us=True, block=columns.block)
        return decoder, raw

    def _find_decoder(self, stream: str) -> _StreamDecoder:
        decoder = self._decoders.get(stream)
        if decoder is None:
            raise RowRejected(f"unknown stream {stream[:40]!r}{did_you_mean(stream, self._decoders, NO_STREAM)}")
        if decoder.stream.media_format is not None:
            raise RowRejected(f"stream {stream!r} takes whole files only; put them into its folder")
        return decoder

    def _parse_run(self, lines: list[bytes]) -> tuple[_StreamDecoder, RawColumns] | None:
        """Decode all lines as rows of the last line's stream; None if that fails."""
        decoder = self._likely_decoder
        if decoder is None or len(lines) < 2:
            return None
        text = _to_json_array(lines)
        if text is None:
            return None
        try:
            decoded = decoder.run_decoder.decode(text)
            return (decoder, decoder.transpose(decoded, text)) if len(decoded) == len(lines) else None
        except _DECODE_ERRORS:
            return None

    def _parse_line(self, line: bytes, number: int, now_us: int) -> ParsedLines:
        if len(line) > MAX_LINE_BYTES:
            raise RowRejected(f"line of {len(line)} bytes, the limit is {MAX_LINE_BYTES}; split it")
        if (decoder := self._columnar_decoder) is not None and (decoded := decoder.decode_columns(line)) is not None:
            return self._parse_columns(decoder, decoded, line, number, now_us)
        try:
            head = decoders.from_json(line, _LineHead)
        except _DECODE_ERRORS as error:
            raise RowRejected(_explain_json_error(line, error)) from None
        if isinstance(head.stream, msgspec.UnsetType):
            return _parse_labels(line, number, head)
        decoder = self._find_decoder(head.stream)
        by_columns = bool(bytes(head.columns)) or bool(bytes(head.packed))
        self._likely_decoder, self._columnar_decoder = (None, decoder) if by_columns else (decoder, None)
        try:
            if not by_columns:
                raw = decoder.transpose([decoder.row_decoder.decode(line)], line)
                return self._validate(decoder, raw, [number], now_us)
            decoded = decoder.columns_decoder.decode(line)
        except _DECODE_ERRORS as error:
            raise RowRejected(_explain_field_error(error, decoder)) from None
        return self._parse_columns(decoder, decoded, line, number, now_us)

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
        return self._validate_block(decoder, RawColumns(lengths.pop(), t, values), number, now_us)

    def _validate_block(self, decoder: _StreamDecoder, raw: RawColumns, number: int, now_us: int) -> ParsedLines:
        """Validate rows that came together, as one line: its reason names the rejected ones."""
        parsed = self._validate(decoder, raw, [number], now_us)
        rejected = parsed.validated.rejected if parsed.validated else {}
        if not rejected:
            return parsed
        return ParsedLines(parsed.stream, parsed.validated, [number], {number: summarize_reasons(rejected, "row")})

    def _validate(self, decoder: _StreamDecoder, raw: RawColumns, numbers: list[int], now_us: int) -> ParsedLines:
        validated = self._validate_columns(decoder, raw, now_us)
        self._advance_time(decoder, validated)
        if len(numbers) < raw.n:
            return ParsedLines(decoder.name, validated, numbers, {})
        rejected = {numbers[index]: reason for index, reason in validated.rejected.items()}
        return ParsedLines(decoder.name, validated, [n for n in numbers if n not in rejected], rejected)

    def _validate_columns(self, decoder: _StreamDecoder, raw: RawColumns, now_us: int) -> ValidatedRows:
        latest = self._latest.get(decoder.name)
        return validate_columns(
            raw, decoder.stream, now_us, latest, show_values=self._show_values, limits=decoder.limits
        )

    def _advance_time(self, decoder: _StreamDecoder, validated: ValidatedRows) -> None:
        if validated.latest_us is not None:
            self._latest[decoder.name] = validated.latest_us


class _StreamDecoder:
    def __init__(self, name: str, stream: StreamConfig) -> None:
        self.name, self.stream = name, stream
        self.limits = BlockLimits.from_fields(stream.fields)
        self.integer_fields = {f.name for f in stream.fields if f.type == "i64"}
        self.category_fields = [f.name for f in stream.fields if f.type == "category"]

    @cached_property
    def _row_type(self) -> type[msgspec.Struct]:
        kinds: dict[str, Any] = {"category": str, "i64": int | float}
        absent = msgspec.UnsetType
        fields: list[Any] = [("stream", str), ("t", float | None | absent, msgspec.UNSET)]
        names = {}
        for index, f in enumerate(self.stream.fields):
            kind: Any = kinds.get(f.type, float)
            # The field's own name could have a meaning in Python, such as __init__.
            names[f"f{index}"] = f.name
            optional = (f"f{index}", kind | None | absent, msgspec.UNSET)
            fields.append(optional if f.optional else (f"f{index}", kind))
        return msgspec.defstruct("Row", fields, kw_only=True, forbid_unknown_fields=True, rename=names, gc=False)

    @cached_property
    def row_decoder(self) -> msgspec.json.Decoder[Any]:
        return decoders.json_decoder(self._row_type)

    @cached_property
    def run_decoder(self) -> msgspec.json.Decoder[Any]:
        return decoders.json_decoder(list[self._row_type])  # type: ignore[name-defined]

    @cached_property
    def columns_decoder(self) -> msgspec.json.Decoder[Any]:
        absent = msgspec.UnsetType
        fields: list[Any] = [("stream", str), ("columns", dict[str, list[Any]] | absent, msgspec.UNSET)]
        fields.append(("packed", dict[str, tuple[NumberType, bytes]] | absent, msgspec.UNSET))
        return decoders.json_decoder(msgspec.defstruct("Columnar", fields, forbid_unknown_fields=True))

    def decode_columns(self, line: bytes) -> Any:
        """Decode the line as columns of this stream; None if it is something else."""
        try:
            decoded = self.columns_decoder.decode(line)
        except _DECODE_ERRORS:
            return None
        has_columns = decoded.columns is not msgspec.UNSET or decoded.packed is not msgspec.UNSET
        return decoded if has_columns and decoded.stream == self.name else None

    def transpose(self, decoded: list[Any], text: bytes) -> RawColumns:
        """Transpose decoded rows of `text` to columns. Raises ValueError for rows of several streams, DuplicateKey."""
        names, times, *columns = zip(*map(msgspec.structs.astuple, decoded), strict=True)
        if names.count(self.name) != len(names):
            raise ValueError("lines of several streams")
        t, absent = _fill_absent(times)
        key_count = (2 + len(columns)) * len(decoded) - absent
        values: dict[str, Any] = {}
        for f, column in zip(self.stream.fields, columns, strict=True):
            values[f.name], absent = _fill_absent(column) if f.optional else (column, 0)
            key_count -= absent
        check_key_count(text, key_count, chain.from_iterable(values[name] for name in self.category_fields))
        return RawColumns(len(decoded), t, values)


def _to_json_array(lines: list[bytes]) -> bytes | None:
    """Join the lines to one JSON array; None if the ends of one show that it is no object."""
    text = b"[" + b"\n,".join(lines) + b"]"
    # Rows are flat and no JSON string holds a newline, so lines with these ends are separate objects: a row that is
    # split over two lines does not pass.
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
        return ParsedLines("", None, [number], {}, label_intake.parse_line(line))
    except _DECODE_ERRORS as error:
        problem, _, path = str(error)[:160].partition(" - at `$.")
        raise RowRejected(f"{path.rstrip('`')}: {problem[:1].lower()}{problem[1:]}" if path else problem) from None


def _fill_absent(column: tuple[Any, ...]) -> tuple[Sequence[Any], int]:
    """Replace absent values by None, and return how many there were."""
    absent = column.count(msgspec.UNSET)
    if not absent:
        return column, 0
    if absent == len(column):
        return [None] * absent, absent
    return [None if value is msgspec.UNSET else value for value in column], absent


def _explain_json_error(line: bytes, error: Exception) -> str:
    if line.startswith(BOM):
        return "a byte order mark before the line; send UTF-8 without it"
    if b"\x00" in line or (not line.isascii() and not _is_text(line)):
        return "not text: binary data on a line protocol"
    if b"NaN" in line or b"Infinity" in line:
        return "NaN and Infinity are no JSON numbers; leave out an optional field instead"
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
    # msgspec has an error of its own for this since 0.23.
    if isinstance(error, UnicodeDecodeError) or problem.startswith("Invalid UTF-8"):
        return f"not text: {problem[:120]}"
    if isinstance(error, DuplicateKey):
        return problem
    names = [f.name for f in decoder.stream.fields]
    if "unknown field" in problem:
        name = problem.split("`")[1]
        if name in names:
            return f"{name!r} is beside columns; a line holds one row, or columns of rows"
        return f"{name!r} is not a field of stream {decoder.name}{did_you_mean(name, names)}"
    if "missing required field" in problem:
        return f"field {problem.split('`')[1]!r} is missing"
    text, _, path = problem.partition(" - at `$.")
    return f"{path.rstrip('`')}: {text[:1].lower()}{text[1:]}" if path else problem[:160]
