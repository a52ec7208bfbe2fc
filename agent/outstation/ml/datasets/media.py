"""Folders of images and sounds: a file is a recording, and the folder it lies in may name its label."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from outstation.foundation.arrays import Float32s
from outstation.foundation.errors import UsageError
from outstation.foundation.indices import repeat
from outstation.foundation.media import ImageFormat, MediaFormat
from outstation.ml.datasets.blocks import FILE_COLUMN, LABEL_COLUMN, RowBlock, require_columns
from outstation.ml.datasets.tables import START, FilePosition, RowRejection
from outstation.ml.model.bundle.manifest import ModelInput
from outstation.ml.model.inference import images, sound

# Longer than any window's max_gap_s is taken to be.
_FILE_GAP_US = 10_000_000
# Of a block: enough that the work for each block is little, and 4 MB.
_IMAGES_PER_BLOCK, _MAX_BLOCK_VALUES = 32, 1_000_000


def list_files(path: Path, spec: ModelInput) -> list[Path]:
    """Return the file at `path`, or all of its kind in that folder and its subfolders, in order. Raises UsageError."""
    suffixes = images.SUFFIXES if spec.image else sound.SUFFIXES
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: cannot be read: No such file or directory")
    paths = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    files = sorted(file for file in paths if file.suffix.lower() in suffixes and file.is_file())
    if not files:
        raise UsageError(f"{path}: no file in it ends with {' or '.join(suffixes)}")
    return files


class MediaReader:
    """Folder of JPEG, PNG or WAV, or one such file; its text columns are the file and the subfolder as label."""

    def __init__(self, path: Path, spec: ModelInput, text_columns: Sequence[str] = ()) -> None:
        """Raise UsageError."""
        media = spec.image or spec.sound
        assert media is not None
        self.path, self._spec, self._media, self._text_columns = path, spec, media, list(text_columns)
        self._files = list_files(path, spec)
        self.columns = [LABEL_COLUMN, FILE_COLUMN]
        self.size = len(self._files)
        require_columns(path, self.columns, self._text_columns)

    def progress(self, position: FilePosition) -> int:
        return position.line

    def blocks(self, position: FilePosition = START) -> Iterator[RowBlock]:
        """Yield blocks of whole files; the next block is decoded meanwhile, on a second processor."""
        files = self._files[position.line :]
        values = self._spec.rows * len(self._spec.fields)
        count = max(1, min(_IMAGES_PER_BLOCK, _MAX_BLOCK_VALUES // values)) if self._spec.image else 1
        batches = (files[start : start + count] for start in range(0, len(files), count))
        with ThreadPoolExecutor(1, "reader") as reader:
            pending = reader.submit(self._decode, next(batches, []))
            for batch in [*batches, []]:
                decoded, pending = pending.result(), reader.submit(self._decode, batch)
                if decoded:
                    block = self._to_block(decoded, position)
                    position = block.next_position
                    yield block

    def _decode(self, files: Sequence[Path]) -> list[tuple[Path, Float32s | UsageError]]:
        """Return the rows of each file, or why it has none."""
        decoded: list[tuple[Path, Float32s | UsageError]] = []
        for file in files:
            try:
                decoded.append((file, _read_rows(file, self._media)))
            except UsageError as problem:
                decoded.append((file, problem))
        return decoded

    def _to_block(self, decoded: Sequence[tuple[Path, Float32s | UsageError]], position: FilePosition) -> RowBlock:
        rejected: list[RowRejection] = []
        rows, times = [np.empty((0, len(self._spec.fields)), np.float32)], [np.empty(0, np.int64)]
        texts: dict[str, list[str]] = {FILE_COLUMN: [], LABEL_COLUMN: []}
        t = position.t
        for line, (file, content) in enumerate(decoded, position.line + 1):
            name = file.name if file == self.path else str(file.relative_to(self.path))
            # No window reaches over the pause between two files.
            t += round(_FILE_GAP_US * (1 + (self._spec.gap_s or 0.0)))
            if isinstance(content, UsageError):
                rejected.append(RowRejection(line, str(content), name))
            elif len(content):
                # The rows of an image have one time.
                period_us = 0.0 if isinstance(self._media, ImageFormat) else self._media.row_period_s * 1e6
                rows.append(content)
                times.append(t + np.rint(np.arange(len(content), dtype=np.float64) * period_us).astype(np.int64))
                t = int(times[-1][-1])
            texts[FILE_COLUMN].append(name)
            texts[LABEL_COLUMN].append(file.parent.name if os.sep in name else "")
        counts = [0 if isinstance(content, UsageError) else len(content) for _, content in decoded]
        columns = {name: repeat(texts[name], counts) for name in dict.fromkeys([*self._text_columns, FILE_COLUMN])}
        n = sum(counts)
        row_numbers = np.arange(position.row + 1, position.row + n + 1, dtype=np.int64)
        end = FilePosition(0, position.line + len(decoded), position.row + n, t)
        return RowBlock(np.concatenate(rows), np.concatenate(times), row_numbers, end, columns, rejected)


def _read_rows(path: Path, media: MediaFormat) -> Float32s:
    """Return all rows of an image or sound. Raises UsageError."""
    if isinstance(media, ImageFormat):
        return images.read_rows(path, media)
    with contextlib.closing(sound.WavReader(path, media.rate)) as wav:
        return np.concatenate([np.zeros((0, len(media.columns)), np.float32), *sound.iter_row_blocks(wav, media)])
