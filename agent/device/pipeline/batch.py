"""One batch of one task: take → features → invoke → judge, and everything decided is committed together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent import __version__, clock, config
from agent.clock import Now
from agent.config import Stream
from agent.device.bundles import overrides
from agent.device.pipeline import columns, drift_state, learned
from agent.device.pipeline.deadline import Deadline
from agent.device.pipeline.drift_state import Ended
from agent.device.store.clock_segments import Stamp, within
from agent.device.store.cost import Meter
from agent.device.store.given import Given
from agent.device.store.message_log import Author
from agent.device.store.rows import EMPTY, Rows, concatenate
from agent.device.store.store import Batch, Store
from agent.device.store.transaction import Transaction
from agent.drift.detectors import modes
from agent.drift.detectors.modes import Modes
from agent.drift.monitor import Judge
from agent.drift.state import State, Verdict
from agent.errors import StorageFull
from agent.model.bundle.bundle import Bundle
from agent.model.inference import features, runtime, scores
from agent.model.inference.features import Cut
from agent.model.inference.inference import MOST_VALUES, Answers, Inference, Runs
from agent.model.inference.scores import Scores
from agent.model.inference.tuning import Choice
from agent.performance import slices

# Model windows of a batch: many of them only where they are short, or none was timed yet.
_MOST_WINDOWS, _MANY_WINDOWS, _MANY_ROWS = 4096, 512, 25_600
# What a transaction counts of a result, in its message and for labels, and of each further column there; of a drift
# window by itself, and of each field.
_RESULT_BYTES, _COLUMN_BYTES, _DRIFT_BYTES, _FIELD_BYTES = 200, 40, 2_000, 1_000
# Of a batch's time in the model: far less than the watchdog's minute, on a day when all else is slow, too.
_MOST_SECONDS = 5.0


class Trying(Protocol):
    """Another bundle is tried with the task's batches; called by each of them."""

    def look(self, task: Task, answers: Answers) -> None:
        """Before the commit of what `task` answered."""

    def write(self, tx: Transaction) -> None:
        """In that commit."""

    def committed(self, task: Task, store: Store, batch: Batch, answers: Answers) -> None:
        """After it. Raises StorageError, and nothing for what the other bundle does."""


@dataclass
class Task:
    """A task with its model loaded. `drift` is the committed state of its judge, `ended` what is to be said first.

    `running` surrounds each run of the model; `suspected`, the agent ended during its last one. Batches have one
    `shrunk`th of the model windows that they could have, after one that there was no room for.
    """

    name: str
    config: config.Task
    stream: Stream
    bundle: Bundle
    model: Runs
    judge: Judge | None
    drift: State | None
    config_digest: str
    keep_results: bool = True
    ended: Ended | None = None
    choice: Choice | None = None
    running: Callable[[], AbstractContextManager[object]] = nullcontext
    suspected: bool = False
    trying: Trying | None = None
    columns: list[int] = field(init=False)
    inference: Inference = field(init=False)
    meter: Meter = field(init=False)
    deadline: Deadline = field(init=False)
    last_label: str = ""
    shrunk: int = 1

    def __post_init__(self) -> None:
        self.meter, self.deadline = Meter(self.name), Deadline(self.name, self.config.deadline)
        names = [f.name for f in self.stream.fields]
        self.columns = [names.index(name) for name in self.bundle.manifest.input.fields]
        made, manifest = self.stream.made, self.bundle.manifest
        if made is not None:
            manifest = features.within(manifest, made.gap_s)
        self.inference = Inference(manifest, self.model)

    @property
    def step(self) -> int:
        return self.inference.step

    @property
    def window_rows(self) -> int:
        return self.inference.rows

    def batch_rows(self, transaction: int) -> int:
        """The most rows of one batch: one window, and as many more as memory, time and `transaction` bytes allow."""
        in_memory = MOST_VALUES // (self.window_rows * len(self.bundle.manifest.input.columns))
        most_s = min(_MOST_SECONDS, self.deadline.seconds or _MOST_SECONDS)
        in_time = _MANY_WINDOWS if self.choice is None else int(most_s * self.choice.rows_per_s)
        many = min(_MOST_WINDOWS, max(_MANY_WINDOWS, _MANY_ROWS // self.step))
        # The other half is for alerts, and for the states of drift and labels.
        written = transaction // 2 // self._window_bytes
        windows = min(many, written, in_memory, in_time, self.deadline.fits) // self.shrunk
        return self.window_rows + max(0, self._to_a_close(windows) - 1) * self.step

    def _to_a_close(self, windows: int) -> int:
        """At most so many model windows, of which the last one closes a drift window where it can: summarized whole."""
        if self.drift is None:
            return windows
        over = (self.drift.open.windows + windows) % self.drift.window
        return windows - over if over < windows else windows

    @property
    def _window_bytes(self) -> int:
        """What a model window may come to in one transaction."""
        manifest = self.bundle.manifest
        further = len(manifest.output.labels) if manifest.output.multi_label else len(manifest.output.names)
        drift = (_DRIFT_BYTES + _FIELD_BYTES * len(manifest.input.fields)) // manifest.drift.window
        return _RESULT_BYTES + _COLUMN_BYTES * further + (drift if self.judge else 0)

    @property
    def reference(self) -> dict[str, Any]:
        manifest = self.bundle.manifest
        return {"name": manifest.name, "version": manifest.version, "digest": self.bundle.digest}


@dataclass(frozen=True, slots=True)
class Done:
    """What one batch did; `listed` results are in its messages."""

    rows: int
    windows: int
    alerts: int
    listed: int = field(default=0, compare=False)


class _Judged(msgspec.Struct, frozen=True):
    state: State | None
    verdicts: list[Verdict]


def run(task: Task, store: Store, author: Author, now: Now) -> Done | None:
    """One batch of what waits for `task`; None where nothing can be consumed yet.

    Raises StorageError; then nothing of it happened, or it is only not told that it was late.
    """
    while True:
        most = task.batch_rows(store.quota.transaction)
        # Not the boot-time clock: while the machine sleeps, no batch is late.
        began, began_s = time.thread_time_ns(), time.monotonic()
        try:
            done = _run(task, store, author, now, most)
        except StorageFull:
            # A full store keeps only so much room back, and readings make way once they were used.
            if most <= task.window_rows:
                raise
            task.shrunk *= 4
        else:
            task.shrunk = max(1, task.shrunk // 2)
            if done is not None:
                task.meter.ran(done.windows, done.rows, done.listed, (time.thread_time_ns() - began) // 1000)
                task.deadline.took(time.monotonic() - began_s, done.windows, store, author, now)
            return done


def _run(task: Task, store: Store, author: Author, now: Now, most: int) -> Done | None:
    after = store.cursor(task.name)
    if after is None:
        after = store.first_row(task.config.stream) - 1
    batch = store.take(task.config.stream, task.stream.fields, after, most)
    if batch is None:
        return None
    if batch.lost:
        return _skip_lost(task, store, author, batch, now)
    cut = features.cut(batch.rows.t, task.inference.manifest.input.window)
    if cut.consumed == 0:
        if not _lost_follows(task, store, batch):
            return None
        cut = Cut(cut.starts, len(batch.rows))
    matrix, answers = _answer(task, store, batch, cut)
    if task.trying is not None:
        task.trying.look(task, answers)
    judged = _judge(task, store, batch, matrix, answers)
    given = _given(task, store, batch, answers)
    names = scores.texts(answers.scores, task.bundle.manifest)
    with store.transaction() as tx:
        tx.advance(task.name, batch.first, batch.first + cut.consumed - 1)
        if task.ended is not None:
            drift_state.end(tx, author, task.name, task.ended, now)
        if task.judge is not None and judged.state is not None:
            drift_state.keep(tx, task.name, task.judge, judged.state, task.drift)
        listed = 0
        for body in _results(task, author, batch, answers, names, tx.segments.announced()):
            author.write(tx, "results", task.name, body, now)
            listed += len(body["columns"]["row"])
        for verdict in judged.verdicts:
            _report(task, author, tx, verdict, now)
        if given is not None:
            tx.labels.keep(task.name, given, tx.uptime_s(now))
        tx.count(f"windows.{task.name}", len(cut.starts))
        task.meter.keep(tx)
        if task.suspected:
            tx.drop(task.name, overrides.CRASHES)
        if task.trying is not None:
            task.trying.write(tx)
    task.meter.kept()
    task.drift, task.ended, task.suspected = judged.state, None, False
    if names:
        task.last_label = names[-1]
    if task.trying is not None:
        task.trying.committed(task, store, batch, answers)
    return Done(cut.consumed, len(cut.starts), sum(len(v.alerts) for v in judged.verdicts), listed)


def _lost_follows(task: Task, store: Store, batch: Batch) -> bool:
    """Whether the rows after `batch` cannot be read, so that these few will never fill a window."""
    following = store.take(task.config.stream, task.stream.fields, batch.last, 1)
    return following is not None and following.lost is not None


def _answer(task: Task, store: Store, batch: Batch, cut: Cut) -> tuple[features.Floats, Answers]:
    """The batch's features in physical units (n, F), and what the model says of its windows."""
    past = history(task, store, batch.first - 1, task.inference.history)
    matrix = features.matrix([batch.rows.columns[i] for i in task.columns])
    rows, t = matrix, batch.rows.t
    if len(past):
        earlier = features.matrix([past.columns[i] for i in task.columns])
        rows, t = np.concatenate([earlier, matrix]), np.concatenate([past.t, t])
    with task.running():
        return matrix, task.inference.answer(rows, t, cut, before=len(past))


def history(task: Task, store: Store, through: int, count: int) -> Rows:
    """The `count` rows up to `through`, that features look back at: fewer where they were deleted or cannot be read."""
    at = max(0, through - count)
    kept: list[Rows] = []
    while at < through:
        found = store.take(task.config.stream, task.stream.fields, at, through - at)
        if found is None:
            break
        kept = [] if found.lost else [*kept, found.rows]
        at = found.last
    return concatenate(kept) if kept else EMPTY


def _judge(task: Task, store: Store, batch: Batch, matrix: features.Floats, answers: Answers) -> _Judged:
    if task.judge is None or task.drift is None:
        return _Judged(None, [])
    found, starts = answers.scores, answers.cut.starts
    labels = found.label if found.label is not None else np.zeros(len(starts), np.int64)
    told = found.value if found.score is None else found.score
    certainty = None if told is None else told[:, None].astype(np.float32)
    state, verdicts = task.judge.step(
        task.drift,
        matrix,
        starts,
        task.window_rows,
        labels,
        certainty,
        rows=(batch.first, batch.last),
        t=batch.rows.t,
        modes=_modes(task, store, batch, answers.cut),
    )
    return _Judged(state, verdicts)


def _modes(task: Task, store: Store, batch: Batch, cut: Cut) -> Modes | None:
    if task.judge is None or not task.judge.mode:
        return None
    codes = batch.rows.columns[[f.name for f in task.stream.fields].index(task.judge.mode)]
    return modes.of_windows(codes, cut.starts, task.window_rows, store.categories(task.config.stream, task.judge.mode))


def _results(
    task: Task, author: Author, batch: Batch, answers: Answers, names: list[str] | None, announced: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    """Bodies that together cover the consumed rows, each within the broker's limit."""
    cut, found = answers.cut, answers.scores
    ends = cut.starts + task.window_rows - 1
    listed = _published(task, found, names)
    missing = np.where(answers.missing > task.bundle.manifest.input.max_missing, answers.missing, 0)
    most = columns.most(author.max_bytes - 2_000 - 1_200, found, names)
    first_row, count, done = 0, len(cut.starts), 0
    while True:
        stop = min(count, done + most)
        through = cut.consumed if stop == count else int(cut.starts[stop - 1]) + task.step
        picked = np.flatnonzero(listed[done:stop]) + done
        listing: dict[str, Any] = {
            "row": (ends[picked] + batch.first).tolist(),
            "t": batch.rows.t[ends[picked]].tolist(),
        }
        listing |= columns.of(found, names, missing, picked)
        rows = [batch.first + first_row, batch.first + through - 1]
        body = _body(task, rows, stop - done, batch.rows.slice(first_row, through), listing)
        if incomplete := int(np.count_nonzero(missing[done:stop])):
            body["incomplete"] = incomplete
        # Where model windows overlap, the last result's row comes after the last row that is used up.
        last = max([rows[1], *listing["row"][-1:]])
        yield body | _clocks(within(batch.stamps, rows[0], last), author, announced)
        first_row, done = through, stop
        if done == count:
            return


def _given(task: Task, store: Store, batch: Batch, answers: Answers) -> Given | None:
    """The results as they are kept for labels; None where there are none, or none are kept."""
    found = answers.scores
    if not len(found) or not task.keep_results:
        return None
    ends = answers.cut.starts + task.window_rows - 1
    names, said = [f.name for f in task.stream.fields], scores.codes(found)
    told: dict[str, list[str]] = {}
    for one in task.config.slices:
        name = one if isinstance(one, str) else one.field
        column = batch.rows.columns[names.index(name)][ends]
        if isinstance(one, str):
            texts = store.categories(task.config.stream, name)
            told[name] = [texts[code] or slices.MISSING for code in column.tolist()]
        else:
            told[name] = slices.binned(column.astype(np.float64), one.edges)
    return Given(task.bundle.digest, ends + batch.first, batch.rows.t[ends], said, found.score, found.value, told)


def _clocks(stamps: Sequence[Stamp], author: Author, announced: tuple[int, int]) -> dict[str, Any]:
    """Whose clock the rows have their times from: [first row, boot, segment, quality] of each run of rows.

    Left out where that goes without saying: all synced, in the boot of the message and the segment of the last anchor.
    """
    plain = announced == (author.boot, announced[1]) and len(stamps) == 1
    if plain and (stamps[0].boot, stamps[0].segment, stamps[0].quality) == (*announced, 0):
        return {}
    return {"clocks": [[stamp.first, stamp.boot, stamp.segment, stamp.quality] for stamp in stamps]}


def _body(task: Task, rows: list[int], n: int, consumed: Rows, columns: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": task.reference,
        "stream": task.config.stream,
        "rows": rows,
        "n": n,
        "input": consumed.digest(),
        "columns": columns,
        "made": {"agent": __version__, "runtime": runtime.NAME, "config": task.config_digest},
    }


def _published(task: Task, found: Scores, names: list[str] | None) -> NDArray[np.bool_]:
    """Which results are listed in messages; all are counted."""
    count, publish = len(found), task.config.publish
    if publish == "summary":
        return np.zeros(count, bool)
    if isinstance(publish, config.Below) and found.score is not None:
        return np.asarray(found.score < publish.below)
    if publish == "changes" and names is not None:
        return np.array([a != b for a, b in zip(names, [task.last_label, *names[:-1]], strict=True)], bool)
    return np.ones(count, bool)


def _report(task: Task, author: Author, tx: Transaction, verdict: Verdict, now: Now) -> None:
    """A closed drift window: its message, then its alerts, which name that message."""
    shipped = task.judge.shipped.digest if task.judge else None
    window = {
        "index": verdict.index,
        "rows": list(verdict.rows),
        "from": clock.rfc3339(verdict.t[0]),
        "to": clock.rfc3339(verdict.t[1]),
        "n": verdict.n,
    }
    head = {"model": task.reference, "reference": {"shipped": shipped, "site": verdict.site}, "window": window}
    seq = author.write(tx, "drift", task.name, {**head, **verdict.summary}, now)
    for alert in verdict.alerts:
        author.write(tx, "alerts", task.name, alert.body(task.name, seq=seq), now)
    learned.tell(task.name, author, tx, verdict, now)


def _skip_lost(task: Task, store: Store, author: Author, batch: Batch, now: Now) -> Done:
    """Rows that cannot be read: covered by a run without results; what is damaged is declared and set aside."""
    rows = [batch.first, batch.last]
    empty: dict[str, Any] = {"row": [], "t": []}
    run_without = {**_body(task, rows, 0, batch.rows, empty), "lost": batch.lost}
    if batch.deleted:
        with store.transaction() as tx:
            tx.advance(task.name, batch.first, batch.last)
            author.write(tx, "results", task.name, run_without, now)
        return Done(batch.last - batch.first + 1, 0, 0)
    summary = (
        f"{task.config.stream}: rows {rows[0]} to {rows[1]} cannot be read back ({batch.lost}); they are set aside in "
        "the store's table `damaged` and have no results. Check the card."
    )
    with store.transaction() as tx:
        tx.advance(task.name, batch.first, batch.last)
        tx.set_aside(task.config.stream, batch.first, batch.last)
        author.write(tx, "results", task.name, run_without, now)
        alert = {
            "alert": "storage",
            "subject": task.config.stream,
            "state": "raised",
            "severity": "critical",
            "id": f"{task.name}/storage/{batch.first}",
            "summary": summary,
            "evidence": {"rows": rows},
        }
        author.write(tx, "alerts", task.name, alert, now)
    return Done(batch.last - batch.first + 1, 0, 1)
