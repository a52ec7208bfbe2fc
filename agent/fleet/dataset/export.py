"""Export of a retraining set: data, provenance and card as files of a folder, with a manifest of their hashes.

`data` has the rows of all recordings, newest first, with a label where a result has one; `model pack --from --data` and
`model evaluate` read it. `samples.jsonl` says where each row came from, and what its device knew of drift then.
"""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from agent import decoders, durable_files
from agent.datasets.blocks import LABEL_COLUMN, TIME_COLUMN
from agent.datasets.parquet_table import describe_missing_pyarrow
from agent.errors import StorageError, UsageError
from agent.fleet.database.store import FleetStore
from agent.fleet.dataset import card as cards
from agent.fleet.dataset import derived, gather
from agent.fleet.dataset.card import DataCard
from agent.fleet.dataset.derived import DerivedColumns
from agent.fleet.dataset.gather import TEXT_COLUMNS, Gathered, Recording, Selection
from agent.fleet.export.export import to_parquet
from agent.fleet.export.manifest import FILE_MODE, sha256
from agent.indices import repeat
from agent.model.bundle.feature_set import FeatureReference
from agent.text import csv_text
from agent.transport.sealing import Opener

FORMAT = "outstation-dataset-1"
MANIFEST, PROVENANCE, CARD = "manifest.json", "samples.jsonl", "card.json"
CARD_TEXT, FEATURES = "DATA_CARD.md", "features.json"
DataFormat = Literal["parquet", "csv"]


class DatasetFile(msgspec.Struct, frozen=True):
    path: str
    bytes: int
    sha256: str


class DatasetManifest(msgspec.Struct, frozen=True):
    selection: Selection
    created: str
    licence: str
    files: list[DatasetFile]
    format: str = FORMAT
    features: FeatureReference | None = None


def export(
    store: FleetStore,
    out: Path,
    selection: Selection,
    opener: Opener,
    data_format: DataFormat,
    licence: str,
    created: str,
    *,
    only_labelled: bool = False,
    features: Path | None = None,
) -> DataCard:
    """Write a new folder, as a whole or not at all; with the columns of the feature file `features`.

    Raises UsageError, ConfigError, StorageError.
    """
    if out.exists():
        raise UsageError(f"{out}: is there already, and a set never changes; name a new folder with --out")
    with store.snapshot() as db:
        gathered = gather.gather(db, selection, opener)
    if only_labelled:
        labelled = [each for each in gathered.recordings if any(label.label is not None for label in each.labels)]
        before, after = (sum(len(each.samples) for each in group) for group in (gathered.recordings, labelled))
        gathered.left_out["without a label"] += before - after
        gathered.recordings = labelled
    if not gathered.recordings:
        reasons = ", ".join(f"{n} {reason}" for reason, n in gathered.left_out.items() if n)
        raise UsageError(
            f"no readable sample of task {selection.task!r}{reasons and f' ({reasons} left out)'}; devices send them "
            "where their owners consent ([samples] in their config): `outstation fleet samples DEVICE`"
        )
    derived_columns = None if features is None else derived.compute(features, gathered)
    card = cards.build(gathered, selection, licence, created, derived_columns)
    to_data = _to_parquet if data_format == "parquet" else _to_csv
    data = to_data(gathered, derived_columns)
    contents = {
        f"data.{data_format}": data,
        PROVENANCE: b"".join(msgspec.json.encode(line) + b"\n" for line in _provenance_lines(gathered)),
        CARD: msgspec.json.format(msgspec.json.encode(card)),
        CARD_TEXT: card.to_markdown().encode(),
    }
    if derived_columns is not None:
        contents[FEATURES] = msgspec.json.format(msgspec.json.encode(derived_columns.feature_set))
    files = [DatasetFile(path, len(content), sha256(content)) for path, content in contents.items()]
    reference = None if derived_columns is None else derived_columns.feature_set.reference
    manifest = DatasetManifest(selection, created, licence, files, features=reference)
    _write_folder(out, contents | {MANIFEST: msgspec.json.format(msgspec.json.encode(manifest))})
    return card


def check(folder: Path) -> list[str]:
    """Return what of a set differs from its manifest. Raises UsageError."""
    try:
        manifest = decoders.from_json((folder / MANIFEST).read_bytes(), DatasetManifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"{folder / MANIFEST}: cannot be read as the manifest of a dataset: {error}") from None
    if manifest.format != FORMAT:
        raise UsageError(f"{folder / MANIFEST}: has format {manifest.format!r}, this version reads {FORMAT!r}")
    problems = []
    for file in manifest.files:
        if Path(file.path).name != file.path or (folder / file.path).is_symlink():
            problems.append(f"{file.path}: leads out of the folder")
            continue
        try:
            content = (folder / file.path).read_bytes()
        except OSError as error:
            problems.append(f"{file.path}: {error.strerror}")
            continue
        if (len(content), sha256(content)) != (file.bytes, file.sha256):
            problems.append(f"{file.path}: is not the file that {MANIFEST} names")
    known = {MANIFEST, *(file.path for file in manifest.files)}
    return problems + [
        f"{path.name}: is not in {MANIFEST}" for path in sorted(folder.iterdir()) if path.name not in known
    ]


def _write_folder(out: Path, contents: dict[str, bytes]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}; name another place with --out") from None
    try:
        for path, content in contents.items():
            durable_files.write(work / path, content, FILE_MODE)
        work.rename(out)
    except (OSError, StorageError):
        for path in contents:
            (work / path).unlink(missing_ok=True)
        work.rmdir()
        raise


def _name(recording: Recording) -> str:
    return f"{recording.device}/{recording.log}/{recording.first}"


def _text_rows(recording: Recording) -> Iterator[tuple[str, str]]:
    """Return (label, its sources) of each row, "" without one."""
    by_row = {label.row: label for label in recording.labels if label.label is not None}
    for row in range(recording.first, recording.last + 1):
        label = by_row.get(row)
        yield ("", "") if label is None else (label.label or "", "+".join(label.sources))


def _to_parquet(gathered: Gathered, derived_columns: DerivedColumns | None) -> bytes:
    try:
        import pyarrow as pa
    except ImportError:
        raise UsageError(f"{describe_missing_pyarrow()}: --format csv") from None
    recordings, texts = gathered.recordings, [pair for each in gathered.recordings for pair in _text_rows(each)]
    values = np.concatenate([recording.values for recording in recordings])
    columns: dict[str, Any] = {TIME_COLUMN: pa.array(np.concatenate([each.t for each in recordings]) / 1e6)}
    columns |= {name: pa.array(values[:, i], from_pandas=True) for i, name in enumerate(gathered.fields)}
    if derived_columns is not None:
        computed = np.concatenate(derived_columns.values)
        columns |= {name: pa.array(computed[:, i], from_pandas=True) for i, name in enumerate(derived_columns.names)}
    columns[LABEL_COLUMN] = pa.array([label or None for label, _ in texts], pa.string())
    counts = [len(each.t) for each in recordings]
    devices, names, sources = TEXT_COLUMNS
    for name, entries in ((devices, [each.device for each in recordings]), (names, [*map(_name, recordings)])):
        columns[name] = pa.array(repeat(entries, counts).tolist(), pa.string())
    columns[sources] = pa.array([source or None for _, source in texts], pa.string())
    return to_parquet(pa.table(columns))


def _to_csv(gathered: Gathered, derived_columns: DerivedColumns | None) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = [] if derived_columns is None else derived_columns.names
    writer.writerow([TIME_COLUMN, *gathered.fields, *names, LABEL_COLUMN, *TEXT_COLUMNS])
    for index, recording in enumerate(gathered.recordings):
        values = recording.values
        if derived_columns is not None:
            # float64 holds float32, so that the text gives the same bits.
            values = np.concatenate([values, derived_columns.values[index].astype(np.float64)], axis=1)
        cells = zip(recording.t.tolist(), values.tolist(), _text_rows(recording), strict=True)
        place = [csv_text(recording.device), csv_text(_name(recording))]
        for t, row, (label, source) in cells:
            shown = ["" if value != value else repr(value) for value in row]
            writer.writerow([f"{t / 1e6:.6f}", *shown, label, *place, source])
    return buffer.getvalue().encode()


def _provenance_lines(gathered: Gathered) -> Iterator[dict[str, Any]]:
    for recording in gathered.recordings:
        yield {
            "recording": _name(recording),
            "rows": [recording.first, recording.last],
            "samples": recording.samples,
            "labels": [
                {**msgspec.to_builtins(label), "predicted": recording.predictions.get(label.row)}
                for label in recording.labels
            ],
        }
