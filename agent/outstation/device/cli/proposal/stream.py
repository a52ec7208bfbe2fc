"""Proposed stream: a config section from the first rows of a file, or from messages that a broker delivers."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from outstation.device.cli.proposal.fields import ProposedField, make_name, propose_columns
from outstation.device.config import BrokerConfig, check_broker
from outstation.foundation.config.toml_files import encode_value
from outstation.foundation.errors import ConfigError, LinkDown, UsageError
from outstation.foundation.text import printable
from outstation.ml.datasets import readers
from outstation.ml.datasets.parquet_table import ParquetTable
from outstation.ml.datasets.tables import ColumnType, TableOptions
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage

_MAX_ROWS, _MAX_MESSAGES, _MAX_PATHS, _MAX_DEPTH = 10_000, 500, 200, 6


class ProposedStream(msgspec.Struct, frozen=True):
    """Stream `name` as a section of TOML, and what a person has to know of it, as sentences."""

    name: str
    toml: str
    notes: list[str]


def propose_from_file(path: Path) -> ProposedStream:
    """Propose the stream of a table's rows. Raises UsageError."""
    with readers.open_table(path, TableOptions(max_rows=_MAX_ROWS)) as table:
        names = list(dict.fromkeys(table.columns))
        numbers = table.number_columns if isinstance(table, ParquetTable) else ()
        types = {name: ColumnType.FLOAT if name in numbers else ColumnType.TEXT for name in names}
        block = next(table.read(types), None)
    if block is None or not len(block.row_numbers):
        raise UsageError(f"{path}: there is no row in it; fields are proposed from rows")
    columns = propose_columns({name: list(block.columns[name].tolist()) for name in names})
    if not columns.fields:
        raise UsageError(f"{path}: no column holds numbers; {'; '.join(columns.notes)}")
    name = make_name(path.stem, set()).lower()[:32]
    options = [f"--map {_shell(f.place)}={f.name}" for f in columns.fields if f.place != f.name]
    options += [f"--map {_shell(columns.time)}=t"] if columns.time not in (None, "t") else []
    options += ["--timezone Europe/Berlin"] if columns.is_local else []
    used = {f.place for f in columns.fields} | {columns.time}
    options += [f"--ignore {_shell(column)}" for column in names if column not in used]
    command = " ".join(["outstation", "ingest", name, _shell(str(path)), *options])
    zone = [f"{columns.time} names no time zone: put yours into the command."] if columns.is_local else []
    notes = [*columns.notes, *zone, f"Add the file: {command}"]
    return ProposedStream(name, _to_toml(name, columns.fields, ""), notes)


def propose_from_broker(url: str, topic: str, seconds: float) -> ProposedStream:
    """Propose the stream of the messages that come within `seconds`. Raises UsageError."""
    broker = BrokerConfig(url=url, allow_plaintext=True)
    try:
        check_broker("--from", broker)
    except ConfigError as error:
        raise UsageError(f"--from: {error.problem}") from None
    rows: list[dict[str, Any]] = []
    others = 0
    for message in _listen(broker, topic, seconds):
        parsed = _parse_message(message)
        others += not parsed
        rows += parsed
    if not rows:
        texts = f"; {others} messages held no JSON numbers" if others else ""
        raise UsageError(f"--topic {topic!r}: no reading came within {seconds:g} s{texts}; listen longer with --listen")
    places = list(dict.fromkeys(place for row in rows for place in row))[:_MAX_PATHS]
    sample = {place: [row.get(place) for row in rows] for place in places}
    sample |= _topic_levels(topic, rows)
    sample.pop("topic", None)
    columns = propose_columns(sample)
    if not columns.fields:
        raise UsageError(f"--topic {topic!r}: the messages hold no numbers; {'; '.join(columns.notes)}")
    levels = [level for level in topic.split("/") if level not in ("+", "#", "")]
    name = make_name(levels[-1] if levels else "mqtt", set())[:32]
    named = [field for field in columns.fields if field.place != f"$.{field.name}"]
    paths = ", ".join(f"{encode_value(field.name)} = {encode_value(field.place)}" for field in named)
    is_local = broker.host in ("localhost", "127.0.0.1", "::1")
    plain = "" if broker.tls or is_local else ", allow_plaintext = true"
    location = f"{{ url = {encode_value(broker.url)}{plain} }}"
    parts = ['kind = "mqtt"', f"topic = {encode_value(topic)}", f"broker = {location}"]
    parts += [f"paths = {{ {paths} }}"] if paths else []
    if columns.time is not None and all(isinstance(t, int | float | None) for t in sample[columns.time]):
        parts.append(f"t = {encode_value(columns.time)}")
    notes = [*columns.notes, f"{len(rows)} readings were seen; {others} messages held none."]
    return ProposedStream(name, _to_toml(name, columns.fields, f"source = {{ {', '.join(parts)} }}\n"), notes)


def _listen(broker: BrokerConfig, topic: str, seconds: float) -> Iterator[IncomingMessage]:
    try:
        with Link(broker, f"outstation-init-{secrets.token_hex(4)}", subscribe=[topic]) as link:
            due, count = time.monotonic() + seconds, 0
            while (left := due - time.monotonic()) > 0 and count < _MAX_MESSAGES:
                for event in link.receive(min(1.0, left)):
                    if isinstance(event, IncomingMessage):
                        count += 1
                        link.acknowledge(event)
                        yield event
    except LinkDown as down:
        raise UsageError(f"--from: {down}") from None


def _parse_message(message: IncomingMessage) -> list[dict[str, Any]]:
    """Return the readings of a message by JSONPath; none if it holds no JSON object or number."""
    try:
        payload = msgspec.json.decode(message.payload)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return []
    items = payload if isinstance(payload, list) and all(isinstance(item, dict) for item in payload) else [payload]
    rows = []
    for item in items:
        row = dict(_flatten("$", item, 0))
        if row and any(isinstance(value, int | float) and not isinstance(value, bool) for value in row.values()):
            rows.append(row | {"topic": message.topic})
    return rows


def _flatten(path: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and depth < _MAX_DEPTH:
        for name, member in value.items():
            is_plain = re.fullmatch(r"[^\W\d][\w-]*", name)
            quoted = name.replace("\\", "\\\\").replace("'", "\\'")
            yield from _flatten(f"{path}.{name}" if is_plain else f"{path}['{quoted}']", member, depth + 1)
    elif not isinstance(value, Mapping | list):
        yield path, value


def _topic_levels(topic: str, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the levels of the topics that differ, as places such as `topic[1]`."""
    split = [str(row["topic"]).split("/") for row in rows]
    wild = (at for at, level in enumerate(topic.split("/")) if level == "+")
    columns = {f"topic[{at}]": [levels[at] for levels in split] for at in wild}
    return {place: values for place, values in columns.items() if len(set(values)) > 1}


def _to_toml(name: str, fields: list[ProposedField], source: str) -> str:
    listed = "".join(f"  {field.to_toml()},\n" for field in fields)
    head = "# Proposed from what was seen. Check units and ranges: rows outside min and max are rejected."
    return f"{head}\n[streams.{name}]\nfields = [\n{listed}]\n{source}"


def _shell(text: str | None) -> str:
    shown = printable(text or "")
    return shown if re.fullmatch(r"[\w./-]+", shown) else "'" + shown.replace("'", "'\\''") + "'"
