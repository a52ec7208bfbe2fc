"""Rows of further model inputs from files, which are joined to the windows of the first input by time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from outstation.foundation.errors import UsageError
from outstation.ml.datasets import readers
from outstation.ml.datasets.blocks import TIME_COLUMN
from outstation.ml.model.bundle.manifest import Manifest, ModelInput
from outstation.ml.model.inference.joins import JoinedRows


def read(manifest: Manifest, source: Path, files: Mapping[str, Path]) -> dict[str, JoinedRows]:
    """Read the rows of each joined input for the rows of `source`, all into memory. Raises UsageError.

    `files` names the file of an input, or a folder that holds one named as `source`. The rows of an input without one
    are in `source` itself.
    """
    if unknown := [name for name in files if name not in manifest.joined]:
        known = ", ".join(manifest.joined) or "none"
        raise UsageError(f"--join {unknown[0]}: the model has no such further input, it has {known}")
    rows = {}
    for name, spec in manifest.joined.items():
        path = files.get(name, source)
        path = path / source.name if path.is_dir() and not source.is_dir() else path
        # The first input's window decides how far apart recordings of one file are.
        try:
            reader = readers.open_reader(path, ModelInput(fields=spec.fields, window=manifest.input.window))
        except UsageError as problem:
            own = f", or one of its own: --join {name}=FILE, in a SPEC `data` of [inputs.{name}]"
            raise UsageError(f"input {name}: {problem}{own if path == source else ''}") from None
        if path != source and path.suffix != ".npz" and TIME_COLUMN not in reader.columns:
            raise UsageError(f"{path}: has no column {TIME_COLUMN}, so its rows cannot be joined by time")
        blocks = [(block.rows, block.t) for block in reader.blocks()]
        values = [part for part, _ in blocks] or [np.empty((0, len(spec.fields)), np.float32)]
        times = [part for _, part in blocks] or [np.empty(0, np.int64)]
        rows[name] = JoinedRows(np.concatenate(values), np.concatenate(times))
    return rows
