"""Images and sounds as blocks of rows, a file at a time: the folder a file lies in is its label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from agent.errors import UsageError
from agent.evaluation.blocks import FILE, LABEL, Block, Place, Rejected, require
from agent.model import recordings
from agent.model.manifest import Input

_PAUSE_US = 10_000_000


class MediaFiles:
    """A folder of JPEG, PNG or WAV with its subfolders, or one such file; what is none is rejected by its name."""

    def __init__(self, path: Path, spec: Input, texts: Sequence[str] = ()) -> None:
        """Raises UsageError."""
        self.path, self._spec, self._texts = path, spec, list(texts)
        self._files = recordings.files(path, spec)
        self.columns = [LABEL, FILE]
        self.size = len(self._files)
        require(path, self.columns, self._texts)

    def done(self, place: Place) -> int:
        return place.line

    def blocks(self, place: Place) -> Iterator[Block]:
        for file in self._files[place.line :]:
            block = self._block(file, place)
            place = block.after
            yield block

    def _block(self, file: Path, place: Place) -> Block:
        name = file.name if file == self.path else str(file.relative_to(self.path))
        rejected: list[Rejected] = []
        try:
            [rows], t = recordings.read([file], self._spec)
        except UsageError as problem:
            rejected.append(Rejected(place.line + 1, str(problem)))
            rows, t = np.empty((0, len(self._spec.fields)), np.float32), np.empty(0, np.int64)
        # No window reaches over the pause between two files.
        begin = place.t + round(_PAUSE_US * (1 + (self._spec.gap_s or 0.0)))
        number = np.arange(place.row + 1, place.row + len(rows) + 1, dtype=np.int64)
        label = file.parent.name if file.parent != self.path and file != self.path else ""
        told = {LABEL: label, FILE: name}
        texts = {column: np.full(len(rows), told[column]) for column in dict.fromkeys([*self._texts, FILE])}
        after = Place(0, place.line + 1, place.row + len(rows), begin + (int(t[-1]) if len(t) else 0))
        return Block(rows, begin + t, number, after, texts, rejected, name)
