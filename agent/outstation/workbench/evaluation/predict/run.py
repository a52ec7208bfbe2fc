"""Batch prediction over files, block by block, with checkpoints: a killed run resumes where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np

from outstation.foundation import decoders, durable_files
from outstation.foundation.arrays import Ints
from outstation.foundation.errors import UsageError
from outstation.ml.datasets import joined_rows, media, readers
from outstation.ml.datasets.blocks import FILE_COLUMN, RowBlock, TextColumn
from outstation.ml.datasets.tables import BLOCK_BYTES, FilePosition
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference.inference import Inference
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.workbench.evaluation.examples import NO_FILES
from outstation.workbench.evaluation.predict import output
from outstation.workbench.evaluation.predict.ledger import FileJob, RunLedger, RunTotals
from outstation.workbench.evaluation.predict.output import OutputColumns, PartialOutput
from outstation.workbench.evaluation.predictions import StreamingPredictor

CHECKPOINT_INTERVAL_S = 2.0
CHECKPOINT_SUFFIX = ".part.state"
# Units done, all units, and rows so far.
Progress = Callable[[int, int, int], None]


class _Checkpoint(msgspec.Struct):
    """State to resume from: position in the file, bytes written, and the rows and history of an unfinished window."""

    identity: str
    position: FilePosition = FilePosition()
    written: int = 0
    totals: RunTotals = msgspec.field(default_factory=RunTotals)
    pending: tuple[bytes, bytes, bytes] = (b"", b"", b"")
    history_rows: int = 0

    @classmethod
    def load(cls, sidecar: Path, identity: str, size: int) -> _Checkpoint:
        """Return the checkpoint of the same work, if the `size` bytes of its output are still there; else a new one."""
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            state = decoders.from_msgpack(sidecar.read_bytes(), cls)
            if state.identity == identity and size >= state.written:
                return state
        return cls(identity)

    def save(self, sidecar: Path, stream: StreamingPredictor) -> None:
        self.history_rows = stream.history_rows
        self.pending = (stream.rows.tobytes(), stream.t.tobytes(), stream.row_numbers.tobytes())
        durable_files.write(sidecar, msgspec.msgpack.encode(self))

    def restore_stream(self, inference: Inference) -> StreamingPredictor:
        stream = StreamingPredictor(inference)
        rows, t, row_numbers = self.pending
        stream.history_rows = self.history_rows
        if t:
            stream.t, stream.row_numbers = np.frombuffer(t, np.int64), np.frombuffer(row_numbers, np.int64)
            stream.rows = np.frombuffer(rows, np.float32).reshape(len(stream.t), -1)
        return stream


class BatchPredictor:
    """Bundle to run over files; with `raw` the model's outputs are written, too."""

    def __init__(
        self,
        bundle: Bundle,
        inference: Inference,
        *,
        raw: bool = False,
        block_bytes: int = BLOCK_BYTES,
        joined: Mapping[str, Path] = NO_FILES,
    ) -> None:
        self.joined = {name: path.resolve() for name, path in joined.items()}
        self.inference, self._digest, self.raw, self._block_bytes = inference, bundle.digest, raw, block_bytes
        self._columns = OutputColumns(inference.manifest, inference.model.outputs, raw=raw)

    def identity(self, source: Path, out: Path) -> str:
        """Return a digest of everything that the output depends on."""
        spec = self.inference.manifest.input
        files = media.list_files(source, spec) if readers.is_media(spec) and source.is_dir() else [source]
        files = [*files, *self._joined_files(source)]
        stats = [(str(path), stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()]]
        parts = [str(source.resolve()), stats, self._digest, runtime_name(), self.raw]
        return hashlib.sha256(json.dumps([*parts, out.suffix, self._block_bytes]).encode()).hexdigest()

    def _joined_files(self, source: Path) -> list[Path]:
        return [file / source.name if file.is_dir() else file for file in self.joined.values()]

    def make_job(self, source: Path, out: Path) -> FileJob:
        return FileJob(source, out, self.identity(source, out))

    def predict_file(self, source: Path, out: Path, progress: Progress) -> RunTotals:
        """Write the predictions for all of `source` to `out`. Raises UsageError."""
        if out.exists() and any(out.samefile(file) for file in (source, *self._joined_files(source)) if file.exists()):
            raise UsageError(f"{out}: is the data itself, which would be overwritten; name another file with -o")
        spec = self.inference.manifest.input
        reader = readers.open_reader(source, spec, block_bytes=self._block_bytes)
        joined = joined_rows.read(self.inference.manifest, source, self.joined)
        sidecar = checkpoint_path(out)
        with contextlib.closing(PartialOutput(out, self._columns)) as part:
            # Only under the lock: until then another run may have written it.
            state = _Checkpoint.load(sidecar, self.identity(source, out), part.size)
            part.resume(state.written)
            stream = state.restore_stream(self.inference)
            saved_s = time.monotonic()
            for block in reader.blocks(state.position):
                rows, result = stream.feed(block.rows, block.t, block.row_numbers, joined, raw=self.raw)
                part.write(rows, result, self._file_names(block, rows, source))
                state.totals.results += len(rows)
                state.totals.incomplete += int((result.missing_share > spec.max_missing).sum())
                state.totals.add_block(source.name, len(block.rows), block.rejected)
                state.position = block.next_position
                # Their arrays are freed before the next block is read.
                del block, rows, result
                progress(reader.progress(state.position), reader.size, state.totals.rows)
                if time.monotonic() - saved_s >= CHECKPOINT_INTERVAL_S:
                    state.written = part.sync()
                    state.save(sidecar, stream)
                    saved_s = time.monotonic()
            part.finish()
        sidecar.unlink(missing_ok=True)
        return state.totals

    def _file_names(self, block: RowBlock, rows: Ints, source: Path) -> TextColumn | None:
        """Return the file of each of `rows`, if it is a column; recordings of images or sounds are one file."""
        if FILE_COLUMN not in self._columns.names or not len(rows):
            return None
        files = block.text_columns.get(FILE_COLUMN, np.full(len(block.rows), source.name))
        names: TextColumn = files[rows - block.row_numbers[0]]
        return names


def predict_folder(predictor: BatchPredictor, source: Path, out: Path, progress: Progress) -> RunTotals:
    """Predict each file of `source`, a stream of its own, into a file of the same name in `out`; skip finished ones."""
    sources = list_inputs(source, out)
    ledger, total = RunLedger(out), RunTotals()
    for i, path in enumerate(sources):
        job = predictor.make_job(path, out / path.name)
        totals = ledger.get(job)
        if totals is None:

            def report(done: int, size: int, rows: int, i: int = i) -> None:
                progress(i * 1000 + 1000 * done // max(1, size), len(sources) * 1000, total.rows + rows)

            totals = predictor.predict_file(job.source, job.target, report)
            ledger.add(job, totals)
        total.add(totals)
    ledger.remove()
    return total


def list_inputs(source: Path, out: Path) -> list[Path]:
    """Return the files of the folder `source`, and create the folder `out`. Raises UsageError."""
    if out.exists() and (not out.is_dir() or out.samefile(source)):
        raise UsageError(f"{out}: DATA is a folder, so name another folder with -o")
    files = readers.list_files(source, output.OUTPUT_SUFFIXES)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be created: {error.strerror}; name another folder with -o") from None
    return files


def checkpoint_path(out: Path) -> Path:
    return out.with_name(f"{out.name}{CHECKPOINT_SUFFIX}")


def checkpoint_rows(sidecar: Path) -> int:
    """Return the rows that a run, perhaps in another process, had read at its last checkpoint."""
    try:
        return decoders.from_msgpack(sidecar.read_bytes(), _Checkpoint).totals.rows
    except (OSError, msgspec.MsgspecError):
        return 0
