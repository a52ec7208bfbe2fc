"""Images and sounds as blocks of rows, of whole files: the folder a file lies in is its label."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from agent.datasets import media_folders
from agent.datasets.blocks import FILE, LABEL, Block, Place, Rejected, require
from agent.errors import UsageError
from agent.model.bundle.manifest import Input
from agent.model.inference.features import Floats

_PAUSE_US = 10_000_000
# Of a block: enough that the work for each block is little, and 4 MB.
_IMAGES, _MOST_VALUES = 32, 1_000_000


class MediaFiles:
    """A folder of JPEG, PNG or WAV with its subfolders, or one such file; what is none is rejected by its name."""

    def __init__(self, path: Path, spec: Input, texts: Sequence[str] = ()) -> None:
        """Raises UsageError."""
        self.path, self._spec, self._texts = path, spec, list(texts)
        self._files = media_folders.files(path, spec)
        self.columns = [LABEL, FILE]
        self.size = len(self._files)
        require(path, self.columns, self._texts)

    def done(self, place: Place) -> int:
        return place.line

    def blocks(self, place: Place) -> Iterator[Block]:
        """Read beside the work on the block before: that lets a second processor decode images."""
        some = self._many(self._files[place.line :])
        with ThreadPoolExecutor(1, "reader") as reader:
            coming = reader.submit(self._read, next(some, []))
            for following in [*some, []]:
                read, coming = coming.result(), reader.submit(self._read, following)
                if read:
                    block = self._block(read, place)
                    place = block.after
                    yield block

    def _many(self, files: Sequence[Path]) -> Iterator[Sequence[Path]]:
        """Small images together, each sound by itself."""
        values = self._spec.rows * len(self._spec.fields)
        count = max(1, min(_IMAGES, _MOST_VALUES // values)) if self._spec.image else 1
        return (files[start : start + count] for start in range(0, len(files), count))

    def _read(self, files: Sequence[Path]) -> list[tuple[Path, Floats | UsageError]]:
        """The rows of each file, or why it has none."""
        found: list[tuple[Path, Floats | UsageError]] = []
        made = self._spec.image or self._spec.sound
        assert made is not None
        for file in files:
            try:
                found.append((file, media_folders.file_rows(file, made)))
            except UsageError as problem:
                found.append((file, problem))
        return found

    def _block(self, read: Sequence[tuple[Path, Floats | UsageError]], place: Place) -> Block:
        rejected: list[Rejected] = []
        rows, times = [np.empty((0, len(self._spec.fields)), np.float32)], [np.empty(0, np.int64)]
        told: dict[str, list[str]] = {FILE: [], LABEL: []}
        at_us, made = place.t, self._spec.image or self._spec.sound
        assert made is not None
        for line, (file, found) in enumerate(read, place.line + 1):
            alone = file is self._files[0] and file == self.path
            name = file.name if alone else str(file)[len(str(self.path)) + 1 :]
            # No window reaches over the pause between two files.
            at_us += round(_PAUSE_US * (1 + (self._spec.gap_s or 0.0)))
            if isinstance(found, UsageError):
                rejected.append(Rejected(line, str(found), name))
            elif len(found):
                rows.append(found)
                times.append(at_us + media_folders.times_us(len(found), made))
                at_us = int(times[-1][-1])
            told[FILE].append(name)
            told[LABEL].append(file.parent.name if os.sep in name else "")
        counts = [0 if isinstance(found, UsageError) else len(found) for _, found in read]
        texts = {column: np.repeat(told[column], counts) for column in dict.fromkeys([*self._texts, FILE])}
        n = sum(counts)
        number = np.arange(place.row + 1, place.row + n + 1, dtype=np.int64)
        after = Place(0, place.line + len(read), place.row + n, at_us)
        return Block(np.concatenate(rows), np.concatenate(times), number, after, texts, rejected)
