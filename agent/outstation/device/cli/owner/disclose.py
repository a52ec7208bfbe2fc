"""Command `outstation disclose`: the rows of one results message and the key that proves them, for an auditor."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import click

from outstation.device.bootstrap import device
from outstation.device.config import Config
from outstation.device.machine import secret_file
from outstation.device.store.rows import Rows, concatenate
from outstation.device.store.store import Store
from outstation.foundation.cli.options import config_option
from outstation.foundation.cli.output import emit
from outstation.foundation.errors import UsageError
from outstation.protocol.wire import commitment
from outstation.protocol.wire.commitment import DisclosedJoin, Disclosure

NO_SPANS: Mapping[str, tuple[int, int]] = {}


@click.command(epilog="Example: outstation disclose exercise --rows 1201-1400 > rows.json")
@click.argument("task")
@click.option("--rows", "span", metavar="A-B", required=True, help="First and last row, as `rows` in the message says.")
@click.option("--log", metavar="LOG", help="Log in which the message was first written; default: the current one.")
@click.option("--joined", "joined_spans", metavar="NAME=A-B", multiple=True,
              help="Rows of a further input, as `joined` in the message says; repeat for several.")  # fmt: skip
@config_option
def disclose(task: str, span: str, log: str | None, joined_spans: tuple[str, ...], config_file: str | None) -> None:
    """Print the rows behind one results message of TASK as JSON, with the key of its commitment.

    The key opens this message and no other. `outstation fleet log disclosed` compares both with the signed message. The
    rows must still be stored: see [buffer] keep_readings.
    """
    _, conf = device.load_config(config_file, task)
    rows, joined = _parse_span("--rows", span), {}
    for text in joined_spans:
        name, _, joined_span = text.partition("=")
        joined[name] = _parse_span(f"--joined {name}=", joined_span)
    secret = secret_file.COMMITMENT_SECRET.load(conf.data_dir)
    with device.open_store_read_only(conf) as store:
        disclosure = build_disclosure(conf, store, secret, task, log or store.log_id, rows, joined)
    emit(disclosure, True, lambda: None)


def _parse_span(option: str, text: str) -> tuple[int, int]:
    matched = re.fullmatch(r"([1-9]\d{0,15})-([1-9]\d{0,15})", text)
    if matched is None or int(matched[1]) > int(matched[2]):
        raise UsageError(f"{option} {text}: give the first and the last row, such as 1201-1400")
    return int(matched[1]), int(matched[2])


def build_disclosure(
    conf: Config,
    store: Store,
    secret: bytes,
    task: str,
    log: str,
    rows: tuple[int, int],
    joined: Mapping[str, tuple[int, int]] = NO_SPANS,
) -> Disclosure:
    """Return the stored rows with the key of their message, and those `joined` by input. Raises UsageError."""
    settings = conf.tasks[task]
    inputs = {}
    for name, span in joined.items():
        stream = settings.inputs[name].stream if name in settings.inputs else settings.stream
        key = commitment.derive_joined_key(secret, log, stream, span)
        inputs[name] = DisclosedJoin(stream=stream, **_disclose_rows(conf, store, stream, span, key))
    key = commitment.derive_key(secret, log, task, rows)
    own = _disclose_rows(conf, store, settings.stream, rows, key)
    return Disclosure(device=conf.device.id, log=log, task=task, joined=inputs, **own)


def _disclose_rows(conf: Config, store: Store, name: str, rows: tuple[int, int], key: bytes) -> dict[str, Any]:
    """Return the members of `DisclosedRows`. Raises UsageError if rows are gone or protected, StorageError."""
    stream = conf.streams[name]
    if protected := sorted(stream.privacy.protected_fields([field.name for field in stream.fields])):
        raise UsageError(
            f"streams.{name}.privacy: {', '.join(protected)} may not leave as stored, and rows are proven as a whole; "
            "remove the rule if their owner agrees"
        )
    stored = _read_rows(conf, store, name, rows)
    texts = {field.name: store.categories(name, field.name) for field in stream.fields if field.type == "category"}
    columns: list[list[Any]] = []
    for field, column in zip(stream.fields, stored.columns, strict=True):
        values = column.tolist()
        if field.type == "category":
            values = [texts[field.name][code] for code in values]
        columns.append([None if isinstance(value, float) and math.isnan(value) else value for value in values])
    return {
        "rows": rows,
        "key": commitment.encode_key(key),
        "fields": [(field.name, field.type) for field in stream.fields],
        "t": stored.t.tolist(),
        "columns": columns,
        "categories": {
            field.name: {texts[field.name][code]: code for code in set(column.tolist())}
            for field, column in zip(stream.fields, stored.columns, strict=True)
            if field.type == "category"
        },
    }


def _read_rows(conf: Config, store: Store, stream: str, rows: tuple[int, int]) -> Rows:
    parts, at = [], rows[0] - 1
    while at < rows[1]:
        batch = store.read_rows(stream, conf.streams[stream].fields, at, rows[1] - at)
        if batch is None or batch.loss_reason or batch.first != at + 1:
            raise UsageError(
                f"{stream}: rows from {at + 1} on are not stored, so rows {rows[0]} to {rows[1]} cannot be shown; "
                "[buffer] keep_readings says how long rows stay"
            )
        parts.append(batch.rows)
        at = batch.last
    return concatenate(parts)
