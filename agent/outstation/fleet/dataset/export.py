"""Export of a retraining set: data, provenance and card as files of a folder, with a manifest of their hashes.

`data` has the rows of all recordings, newest first, with a label where a result has one, in `label_NAME` that of the
further output NAME; `model pack --from --data` and `model evaluate` read it. `data_files` names the files of further
inputs. `samples.jsonl` says where each row came from, and what its device knew of drift then.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from outstation.fleet.database.store import FleetStore
from outstation.fleet.dataset import card as cards
from outstation.fleet.dataset import data_files, derived, gather
from outstation.fleet.dataset.card import DataCard
from outstation.fleet.dataset.data_files import DataFormat
from outstation.fleet.dataset.gather import Gathered, LabelledOutput, Selection
from outstation.fleet.export.manifest import FILE_MODE, sha256
from outstation.foundation import decoders, durable_files, input_files
from outstation.foundation.errors import StorageError, UsageError, explain
from outstation.ml.model.bundle.feature_set import FeatureReference
from outstation.protocol.transport.sealing import Opener

FORMAT = "outstation-dataset-1"
MANIFEST, PROVENANCE, CARD = "manifest.json", "samples.jsonl", "card.json"
CARD_TEXT, FEATURES = "DATA_CARD.md", "features.json"


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
        labelled = [each for each in gathered.recordings if each.is_labelled]
        before, after = (sum(len(each.samples) for each in group) for group in (gathered.recordings, labelled))
        gathered.left_out["without a label"] += before - after
        gathered.recordings = labelled
    if not gathered.recordings:
        reasons = ", ".join(f"{n} {reason}" for reason, n in gathered.left_out.items() if n)
        raise UsageError(
            f"no readable sample of task {selection.task!r}{reasons and f' ({reasons} left out)'}; devices send them "
            "where their owners consent ([samples] in their config): `outstation fleet dataset samples DEVICE`"
        )
    derived_columns = None if features is None else derived.compute(features, gathered)
    card = cards.build(gathered, selection, licence, created, derived_columns)
    contents = {
        **data_files.build(gathered, derived_columns, data_format),
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
        manifest = decoders.from_json(input_files.read_bytes(folder / MANIFEST), DatasetManifest)
    except (OSError, msgspec.MsgspecError) as error:
        reason = explain(error) if isinstance(error, OSError) else str(error)
        raise UsageError(f"{folder / MANIFEST}: cannot be read as the manifest of a dataset: {reason}") from None
    if manifest.format != FORMAT:
        raise UsageError(f"{folder / MANIFEST}: has format {manifest.format!r}, this version reads {FORMAT!r}")
    problems = []
    for file in manifest.files:
        place = folder / file.path
        if place.resolve() != folder.resolve() / file.path or ".." in Path(file.path).parts:
            problems.append(f"{file.path}: leads out of the folder")
            continue
        try:
            with input_files.open_regular(place) as opened:
                size, digest = os.fstat(opened.fileno()).st_size, hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            problems.append(f"{file.path}: {error.strerror}")
            continue
        if (size, digest) != (file.bytes, file.sha256):
            problems.append(f"{file.path}: is not the file that {MANIFEST} names")
    known = {MANIFEST, *(file.path for file in manifest.files)}
    present = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
    return problems + [f"{path}: is not in {MANIFEST}" for path in present if path not in known]


def _write_folder(out: Path, contents: dict[str, bytes]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}; name another place with --out") from None
    try:
        for path, content in contents.items():
            (work / path).parent.mkdir(mode=0o700, exist_ok=True)
            durable_files.write(work / path, content, FILE_MODE)
        work.rename(out)
    except (OSError, StorageError):
        shutil.rmtree(work, ignore_errors=True)
        raise


def _provenance_lines(gathered: Gathered) -> Iterator[dict[str, Any]]:
    for recording in gathered.recordings:
        yield {
            "recording": data_files.name_recording(recording),
            "rows": [recording.first, recording.last],
            "samples": recording.samples,
            "labels": _describe_labels(recording.get_output("")),
            "outputs": {name: _describe_labels(each) for name, each in recording.outputs.items() if name},
        }


def _describe_labels(output: LabelledOutput) -> list[dict[str, Any]]:
    predicted = {row: msgspec.structs.astuple(result) for row, result in output.predictions.items()}
    return [{**msgspec.to_builtins(label), "predicted": predicted.get(label.row)} for label in output.labels]
