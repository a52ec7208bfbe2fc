"""`outstation fleet dataset`: retraining sets of sampled readings with labels, and the check of their files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outstation.fleet.cli.common import database_options, open_for_reading, print_lines
from outstation.foundation import clock
from outstation.foundation.cli.groups import SentenceGroup
from outstation.foundation.cli.options import MOMENT, PATH, json_option, require_clean_option
from outstation.foundation.cli.output import NOT_CLEAN, echo, emit
from outstation.foundation.text import pluralize

if TYPE_CHECKING:
    from outstation.fleet.dataset.card import DataCard
    from outstation.fleet.dataset.data_files import DataFormat

_BEGIN, _END = "0001-01-01T00:00:00.000000Z", "9999-12-31T23:59:59.999999Z"


@click.group(cls=SentenceGroup, places={"samples": "outstation.fleet.cli.data.samples:samples"})
def dataset() -> None:
    """Make and check retraining sets: sampled readings with labels, provenance and a data card."""


@dataset.command(
    "export", epilog="Example: outstation fleet dataset export --task pump --out set-1 --licence CC-BY-4.0"
)
@click.option("--task", metavar="T", required=True, help="Task whose samples, labels and verdicts are joined.")
@click.option("--out", metavar="DIR", required=True, type=PATH, help="New folder.")
@click.option("--at", type=MOMENT, help="Use only what was known at this time; default now.")
@click.option("--since", type=MOMENT, help='Only samples of this time or later: "24 h", 2026-11-24 or a time.')
@click.option("--until", type=MOMENT, help="Only samples of this time or earlier.")
@click.option("--bundle", metavar="DIGEST", help="Only samples of this bundle; the first digits are enough.")
@click.option("--features", metavar="FILE", type=PATH,
              help="Feature file: add its derived features, as devices compute them.")  # fmt: skip
@click.option("--only-labelled", is_flag=True, help="Leave out recordings without a label.")
@click.option("--format", "data_format", type=click.Choice(["parquet", "csv"]), default="parquet", show_default=True,
              help="Format of the data.")  # fmt: skip
@click.option("--licence", metavar="TEXT", default="", help="Licence of the readings, for the data card.")
@require_clean_option
@database_options
def export_dataset(
    task: str,
    out: Path,
    at: str | None,
    since: str | None,
    until: str | None,
    bundle: str | None,
    features: Path | None,
    only_labelled: bool,
    data_format: DataFormat,
    licence: str,
    require_clean: bool,
    db: str | None,
    home: Path,
    as_json: bool,
) -> None:
    """Export the retraining set of a task: data, provenance, data card, and a manifest of hashes.

    Readings are opened with the fleet's encryption key, so keep the folder where you would keep that. `outstation model
    pack --from MODEL --data DIR/data.parquet` and `outstation model evaluate` read the data. Labels are checked for
    poisoning: flipped ones, triggers, copies, and devices and people whose labels contradict the others'.
    """
    from outstation.fleet.collector.encryption_keys import EncryptionKeys
    from outstation.fleet.dataset import export
    from outstation.fleet.dataset.gather import Selection

    config, store = open_for_reading(home, db)
    now = clock.now_rfc3339()
    digest = bundle and f"sha256:{bundle.removeprefix('sha256:')}"
    selection = Selection(config.fleet.name, task, at or now, since or _BEGIN, until or _END, digest)
    opener = EncryptionKeys(home).opener
    card = export.export(
        store, out, selection, opener, data_format, licence, now, only_labelled=only_labelled, features=features
    )
    emit(card, as_json, lambda: print_lines(*_card_lines(out, card)))
    if require_clean and not card.is_clean:
        echo(f"{out}: {NOT_CLEAN}", err=True)
        sys.exit(1)


def _card_lines(out: Path, card: DataCard) -> Iterator[str]:
    from outstation.fleet.dataset.gather import name_label_column

    labels = card.labels
    rows, devices = pluralize(card.rows, "row"), pluralize(len(card.by_device), "device")
    recordings = pluralize(card.recordings, "recording")
    yield f"{out}: {rows} of {devices} in {recordings}, {labels['labelled']} labels"
    yield from _label_lines(labels)
    yield from (f"left out: {n} samples, {reason}" for reason, n in card.left_out_samples.items())
    if card.features is not None:
        yield f"features {card.features['name']} {card.features['version']} {card.features['digest']}"
        yield from (
            f"  {name}: {n} rows without their history" for name, n in card.features["history_left_out"].items()
        )
    yield from (f"left out: {n} results, {reason}" for reason, n in labels["left_out"].items())
    for output, each in card.outputs.items():
        yield f"output {output}: {each.labels['labelled']} labels, column {name_label_column(output)}"
        yield from _label_lines(each.labels)
        yield from (f"left out: {n} results, {reason}" for reason, n in each.labels["left_out"].items())
    for output, report in card.list_reports():
        head = ("warning: " if report.findings else "") + (f"output {output}: " if output else "")
        yield from (f"{head}{line}" for line in report.describe())
    yield from (f"warning: {warning}" for warning in card.warnings)
    yield f"See {out / 'DATA_CARD.md'}."


def _label_lines(counts: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"  {name}: {n}" for name, n in counts["by_class"].items())
    if numbers := counts["numbers"]:
        yield f"  {numbers['distinct']} numbers from {numbers['lowest']:g} to {numbers['highest']:g}"


@dataset.command("check", epilog="Example: outstation fleet dataset check set-1")
@click.argument("folder", metavar="DIR", type=PATH)
@json_option
def check_dataset(folder: Path, as_json: bool) -> None:
    """Compare the files of a retraining set with its manifest. Exit code 1 if one differs."""
    from outstation.fleet.dataset import export

    problems = export.check(folder)
    lines = problems or [f"{folder}: all files are as in {export.MANIFEST}"]
    emit({"folder": str(folder), "problems": problems}, as_json, lambda: print_lines(*lines), passed=not problems)
