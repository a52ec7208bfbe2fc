"""Images and sounds as blocks of rows, of whole files: the folder a file lies in is its label."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from agent.datasets import media_folders
from agent.datasets.blocks import FILE_COLUMN, LABEL_COLUMN, FilePosition, RowBlock, RowRejection, require_columns
from agent.errors import UsageError
from agent.model.bundle.manifest import ModelInput
from agent.model.inference.features import Floats

_FILE_GAP_US = 10_000_000
# Of a block: enough that the work for each block is little, and 4 MB.
_IMAGES_PER_BLOCK, _MAX_BLOCK_VALUES = 32, 1_000_000


class MediaReader:
    """A folder of JPEG, PNG or WAV with its subfolders, or one such file; what is none is rejected by its name."""

    def __init__(self, path: Path, spec: ModelInput, text_columns: Sequence[str] = ()) -> None:
        """Raises UsageError."""
        self.path, self._spec, self._text_columns = path, spec, list(text_columns)
        self._files = media_folders.list_files(path, spec)
        self.columns = [LABEL_COLUMN, FILE_COLUMN]
        self.size = len(self._files)
        require_columns(path, self.columns, self._text_columns)

    def progress(self, position: FilePosition) -> int:
        return position.line

    def blocks(self, position: FilePosition) -> Iterator[RowBlock]:
        """Read beside the work on the block before: that lets a second processor decode images."""
        some = self._batch_files(self._files[position.line :])
        with ThreadPoolExecutor(1, "reader") as reader:
            coming = reader.submit(self._read_files, next(some, []))
            for following in [*some, []]:
                read, coming = coming.result(), reader.submit(self._read_files, following)
                if read:
                    block = self._to_block(read, position)
                    position = block.next_position
                    yield block

    def _batch_files(self, files: Sequence[Path]) -> Iterator[Sequence[Path]]:
        """Small images together, each sound by itself."""
        values = self._spec.rows * len(self._spec.fields)
        count = max(1, min(_IMAGES_PER_BLOCK, _MAX_BLOCK_VALUES // values)) if self._spec.image else 1
        return (files[start : start + count] for start in range(0, len(files), count))

    def _read_files(self, files: Sequence[Path]) -> list[tuple[Path, Floats | UsageError]]:
        """The rows of each file, or why it has none."""
        found: list[tuple[Path, Floats | UsageError]] = []
        made = self._spec.image or self._spec.sound
        assert made is not None
        for file in files:
            try:
                found.append((file, media_folders.read_rows(file, made)))
            except UsageError as problem:
                found.append((file, problem))
        return found

    def _to_block(self, decoded: Sequence[tuple[Path, Floats | UsageError]], position: FilePosition) -> RowBlock:
        rejected: list[RowRejection] = []
        rows, times = [np.empty((0, len(self._spec.fields)), np.float32)], [np.empty(0, np.int64)]
        told: dict[str, list[str]] = {FILE_COLUMN: [], LABEL_COLUMN: []}
        at_us, made = position.t, self._spec.image or self._spec.sound
        assert made is not None
        for line, (file, found) in enumerate(decoded, position.line + 1):
            alone = file is self._files[0] and file == self.path
            name = file.name if alone else str(file)[len(str(self.path)) + 1 :]
            # No window reaches over the pause between two files.
            at_us += round(_FILE_GAP_US * (1 + (self._spec.gap_s or 0.0)))
            if isinstance(found, UsageError):
                rejected.append(RowRejection(line, str(found), name))
            elif len(found):
                rows.append(found)
                times.append(at_us + media_folders.row_times_us(len(found), made))
                at_us = int(times[-1][-1])
            told[FILE_COLUMN].append(name)
            told[LABEL_COLUMN].append(file.parent.name if os.sep in name else "")
        counts = [0 if isinstance(found, UsageError) else len(found) for _, found in decoded]
        texts = {
            column: np.repeat(told[column], counts) for column in dict.fromkeys([*self._text_columns, FILE_COLUMN])
        }
        n = sum(counts)
        number = np.arange(position.row + 1, position.row + n + 1, dtype=np.int64)
        after = FilePosition(0, position.line + len(decoded), position.row + n, at_us)
        return RowBlock(np.concatenate(rows), np.concatenate(times), number, after, texts, rejected)
