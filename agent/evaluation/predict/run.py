"""`model run`: a model over files, block by block; what was done is kept, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from agent.datasets import blocks, media_folders, tables
from agent.datasets.blocks import FILE, Block, Place, Reader
from agent.errors import UsageError
from agent.evaluation.predict import output
from agent.evaluation.predict.ledger import Job, Ledger, Totals
from agent.evaluation.predict.output import Columns, Part
from agent.evaluation.predictions import Stream
from agent.model.bundle.bundle import Bundle
from agent.model.inference import runtime
from agent.model.inference.inference import Inference

KEEP_EVERY_S = 2.0
STATE = ".part.state"
# Bytes or rows done, of how many, and rows so far.
Progress = Callable[[int, int, int], None]


class _State(msgspec.Struct):
    """What goes on after a kill: `identity` of the work, where in the file, bytes written, rows that wait."""

    identity: str
    place: Place = Place()
    written: int = 0
    totals: Totals = msgspec.field(default_factory=Totals)
    waiting: tuple[bytes, bytes, bytes] = (b"", b"", b"")
    before: int = 0


class Work:
    """A bundle to run over files, with the columns that are wanted."""

    def __init__(self, bundle: Bundle, inference: Inference, *, raw: bool = False, block: int | None = None) -> None:
        self.inference, self._digest, self.raw, self._block = inference, bundle.digest, raw, block
        self._columns = Columns(inference.manifest, inference.model.outputs, raw=raw)

    def identity(self, source: Path, out: Path) -> str:
        """Changes with anything the result depends on."""
        spec = self.inference.manifest.input
        read = media_folders.files(source, spec) if blocks.is_media(spec) and source.is_dir() else [source]
        stats = [(str(path), found.st_size, found.st_mtime_ns) for path in read for found in [path.stat()]]
        told = [str(source.resolve()), stats, self._digest, runtime.NAME, self.raw]
        return hashlib.sha256(json.dumps([*told, out.suffix, self._block]).encode()).hexdigest()

    def job(self, source: Path, out: Path) -> Job:
        return Job(source, out, self.identity(source, out))

    def file(self, source: Path, out: Path, progress: Progress) -> Totals:
        """All of `source`, answered in `out`. Raises UsageError."""
        if out.exists() and out.samefile(source):
            raise UsageError(f"{out}: is the data itself, which would be overwritten; name another file with -o")
        reader = tables.open_file(source, self.inference.manifest.input, block=self._block)
        sidecar = state_of(out)
        part = Part(out, self._columns)
        try:
            # Only now, for until now another run may have gone on.
            state = _load(sidecar, self.identity(source, out), part.size)
            part.begin(state.written)
            stream = _stream(self.inference, state)
            self._turns(reader, stream, state, part, sidecar, progress)
            part.finish()
        finally:
            part.close()
        sidecar.unlink(missing_ok=True)
        return state.totals

    def _turns(
        self, reader: Reader, stream: Stream, state: _State, part: Part, sidecar: Path, progress: Progress
    ) -> None:
        kept = time.monotonic()
        for block in reader.blocks(state.place):
            self._turn(reader, block, stream, state, part)
            progress(reader.done(state.place), reader.size, state.totals.rows)
            if time.monotonic() - kept >= KEEP_EVERY_S:
                state.written = part.keep()
                state.before = stream.before
                state.waiting = (stream.rows.tobytes(), stream.t.tobytes(), stream.number.tobytes())
                _keep(sidecar, state)
                kept = time.monotonic()

    def _turn(self, reader: Reader, block: Block, stream: Stream, state: _State, part: Part) -> None:
        number, answers = stream.feed(block.rows, block.t, block.number, raw=self.raw)
        of = block.texts[FILE][number - block.number[0]] if FILE in block.texts and len(number) else None
        part.write(number, answers, of)
        state.totals.results += len(number)
        state.totals.partly += int((answers.missing > self.inference.manifest.input.max_missing).sum())
        state.totals.count(reader.path.name, len(block.rows), block.rejected)
        state.place = block.after


def folder(work: Work, source: Path, out: Path, progress: Progress) -> Totals:
    """Each file of `source`, a stream of its own, to one of the same name in `out`; what is done is not done again."""
    sources = files(source, out)
    ledger, total = Ledger(out), Totals()
    for i, path in enumerate(sources):
        job = work.job(path, out / path.name)
        done = ledger.of(job)
        if done is None:
            done = work.file(job.source, job.target, _share(progress, i, len(sources), total.rows))
            ledger.add(job, done)
        total.add(done)
    ledger.remove()
    return total


def files(source: Path, out: Path) -> list[Path]:
    """The files of the folder `source`, once the folder `out` is there for their answers. Raises UsageError."""
    if out.exists() and (not out.is_dir() or out.samefile(source)):
        raise UsageError(f"{out}: DATA is a folder, so name another folder with -o")
    found = blocks.files(source, output.SUFFIXES)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be made: {error.strerror}; name another folder with -o") from None
    return found


def _share(progress: Progress, i: int, of: int, before: int) -> Progress:
    """Progress of the i-th of so many files."""
    return lambda done, size, rows: progress(i * 1000 + 1000 * done // max(1, size), of * 1000, before + rows)


def state_of(out: Path) -> Path:
    """What is kept of a file that is not done."""
    return out.with_name(f"{out.name}{STATE}")


def kept_rows(sidecar: Path) -> int:
    """The rows that a run, perhaps in another process, had read when it last kept its state."""
    try:
        return msgspec.msgpack.decode(sidecar.read_bytes(), type=_State).totals.rows
    except (OSError, msgspec.MsgspecError):
        return 0


def _load(sidecar: Path, identity: str, size: int) -> _State:
    """The state of the same work, where the `size` bytes of its output are still there; else a fresh one."""
    try:
        state = msgspec.msgpack.decode(sidecar.read_bytes(), type=_State)
        if state.identity == identity and size >= state.written:
            return state
    except (OSError, msgspec.MsgspecError):
        pass
    return _State(identity)


def _stream(inference: Inference, state: _State) -> Stream:
    stream = Stream(inference)
    rows, t, number = state.waiting
    stream.before = state.before
    if t:
        stream.t, stream.number = np.frombuffer(t, np.int64), np.frombuffer(number, np.int64)
        stream.rows = np.frombuffer(rows, np.float32).reshape(len(stream.t), -1)
    return stream


def _keep(sidecar: Path, state: _State) -> None:
    _replace(sidecar, msgspec.msgpack.encode(state))


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.replace(path)
