"""`outstation fleet dataset samples`: which readings a device sent, and what its owner consents to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outstation.fleet.cli.common import database_options, open_for_reading, print_lines
from outstation.foundation.cli.output import emit, print_table

if TYPE_CHECKING:
    from outstation.fleet.database.datasets.samples import Sample


@click.command("samples", epilog="Example: outstation fleet dataset samples pi-07 --task exercise")
@click.argument("device")
@click.option("--task", metavar="T", help="Only this task.")
@click.option("--last", "limit", metavar="N", default=20, show_default=True, type=click.IntRange(1, 10_000),
              help="The newest N samples.")  # fmt: skip
@database_options
def samples(device: str, task: str | None, limit: int, db: str | None, home: Path, as_json: bool) -> None:
    """List the samples of readings that DEVICE sent, without their content, and its owner's consent.

    Readings stay sealed in the database. `outstation fleet dataset export` opens them, with the fleet's encryption key.
    """
    from outstation.fleet.collector.encryption_keys import EncryptionKeys
    from outstation.fleet.database.datasets import samples as tables

    _, store = open_for_reading(home, db, device)
    opener = EncryptionKeys(home).opener
    listed = tables.list_newest(store, device, task, limit)
    counts = tables.count(store, device)
    declared = tables.load_declaration(store, device)
    rows = [_to_dict(sample, size, opener.can_open(head)) for sample, size, head in listed]
    document = {"device": device, "declared": declared, "counts": counts, "samples": rows}

    def show() -> None:
        print_lines(*_head_lines(device, declared))
        for each in counts:
            print_lines(f"{each.task}, {each.reason}: {each.samples} samples, {each.bytes} bytes, since {each.first}")
        names = ("time", "task", "reason", "row", "rows", "bytes", "readable", "bundle")
        print_table(
            names,
            [[*(row[name] for name in names[:6]), "yes" if row["readable"] else "no", row["bundle"]] for row in rows],
            "No sample.",
        )

    emit(document, as_json, show)


def _to_dict(sample: Sample, size: int, readable: bool) -> dict[str, Any]:
    return {
        "time": sample.time,
        "task": sample.task,
        "reason": sample.reason,
        "subject": sample.subject,
        "row": sample.row,
        "rows": f"{sample.rows_first}-{sample.rows_last}",
        "bytes": size,
        "readable": readable,
        "bundle": f"{sample.model} {sample.version}",
        "digest": sample.digest,
        "log": sample.log,
        "seq": sample.seq,
    }


def _head_lines(device: str, declared: dict[str, Any] | None) -> Iterator[str]:
    if declared is None:
        yield f"{device}: its newest health message declares no consent, so it sends no readings"
        return
    dropped = declared.get("dropped") or {}
    lost = ", ".join(f"{n} dropped ({reason})" for reason, n in sorted(dropped.items())) if dropped else "none dropped"
    used = f"{declared.get('bytes_today')} of {declared.get('max_per_day')} bytes today"
    yield f"{device}: {declared.get('consent')}"
    yield f"{declared.get('sent')} sent, {used}, {lost}"
