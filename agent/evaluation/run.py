"""`model run`: a model over files, block by block; what was done is kept, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from agent.errors import UsageError
from agent.evaluation import blocks, output, tablefile
from agent.evaluation.answers import Stream
from agent.evaluation.blocks import FILE, Block, Place, Reader, Rejected
from agent.evaluation.output import Columns, Part
from agent.model import recordings, runtime
from agent.model.bundle import Bundle
from agent.model.inference import Inference

KEEP_EVERY_S = 2.0
MOST_NAMED = 100  # rejected rows that are named; all are counted
DONE = ".outstation-run.part"
# Bytes or rows done, of how many, and rows so far.
Progress = Callable[[int, int, int], None]


class Named(msgspec.Struct, frozen=True):
    """A rejected row."""

    file: str
    line: int
    reason: str


class Totals(msgspec.Struct):
    """What was read, answered and rejected; `rejected` names the first of `refused`.

    `partly`: results of windows of which more is missing than the bundle allows without a word.
    """

    rows: int = 0
    results: int = 0
    partly: int = 0
    refused: int = 0
    rejected: list[Named] = msgspec.field(default_factory=list)

    def add(self, other: Totals) -> None:
        self.rows += other.rows
        self.results += other.results
        self.partly += other.partly
        self.refused += other.refused
        self.rejected += other.rejected[: MOST_NAMED - len(self.rejected)]

    def count(self, file: str, rows: int, rejected: list[Rejected]) -> None:
        self.rows += rows
        self.refused += len(rejected)
        self.rejected += [Named(r.file or file, r.line, r.reason) for r in rejected[: MOST_NAMED - len(self.rejected)]]


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
        self.inference, self._digest, self._raw, self._block = inference, bundle.digest, raw, block
        self._columns = Columns(inference.manifest, inference.model.outputs, raw=raw)

    def identity(self, source: Path, out: Path) -> str:
        """Changes with anything the result depends on."""
        spec = self.inference.manifest.input
        read = recordings.files(source, spec) if blocks.is_media(spec) and source.is_dir() else [source]
        stats = [(str(path), found.st_size, found.st_mtime_ns) for path in read for found in [path.stat()]]
        told = [str(source.resolve()), stats, self._digest, runtime.NAME, self._raw]
        return hashlib.sha256(json.dumps([*told, out.suffix, self._block]).encode()).hexdigest()

    def file(self, source: Path, out: Path, progress: Progress) -> Totals:
        """All of `source`, answered in `out`. Raises UsageError."""
        if out.exists() and out.samefile(source):
            raise UsageError(f"{out}: is the data itself, which would be overwritten; name another file with -o")
        reader = tablefile.open_file(source, self.inference.manifest.input, block=self._block)
        sidecar = Path(f"{output.part_of(out)}.state")
        state = _load(sidecar, self.identity(source, out), output.part_of(out))
        stream = _stream(self.inference, state)
        part = Part(out, self._columns, state.written)
        try:
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
        number, answers = stream.feed(block.rows, block.t, block.number, raw=self._raw)
        of = block.texts[FILE][number - block.number[0]] if FILE in block.texts and len(number) else None
        part.write(number, answers, of)
        state.totals.results += len(number)
        state.totals.partly += int((answers.missing > self.inference.manifest.input.max_missing).sum())
        state.totals.count(reader.path.name, len(block.rows), block.rejected)
        state.place = block.after


def folder(work: Work, source: Path, out: Path, progress: Progress) -> Totals:
    """Each file of `source`, a stream of its own, to one of the same name in `out`; what is done is not done again."""
    if out.exists() and (not out.is_dir() or out.samefile(source)):
        raise UsageError(f"{out}: DATA is a folder, so name another folder with -o")
    sources = blocks.files(source, output.SUFFIXES)
    out.mkdir(parents=True, exist_ok=True)
    ledger = out / DONE
    done = _ledger(ledger)
    total = Totals()
    for i, path in enumerate(sources):
        identity, target = work.identity(path, out / path.name), out / path.name
        if identity not in done or not target.exists():
            done[identity] = work.file(path, target, _share(progress, i, len(sources), total.rows))
            _replace(ledger, msgspec.msgpack.encode(done))
        total.add(done[identity])
    ledger.unlink(missing_ok=True)
    return total


def _share(progress: Progress, i: int, of: int, before: int) -> Progress:
    """Progress of the i-th of so many files."""
    return lambda done, size, rows: progress(i * 1000 + 1000 * done // max(1, size), of * 1000, before + rows)


def _ledger(path: Path) -> dict[str, Totals]:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=dict[str, Totals])
    except (OSError, msgspec.MsgspecError):
        return {}


def _load(sidecar: Path, identity: str, part: Path) -> _State:
    """The state of the same work, where its output is still there; else a fresh one."""
    try:
        state = msgspec.msgpack.decode(sidecar.read_bytes(), type=_State)
        if state.identity == identity and part.stat().st_size >= state.written:
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
