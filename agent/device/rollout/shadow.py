"""Another bundle that answers beside a task's own, after each batch was committed: no result waits for it.

What both said is tallied, and a `shadow` message says so each so many batches or minutes, in one commit with what is
kept. A kill loses the part since the last message; the last row that is counted is kept, so that none counts twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

import msgspec

from agent.clock import Now
from agent.comparison import tally
from agent.comparison.paired_intervals import Block
from agent.comparison.tally import Said, Tally
from agent.device.pipeline.batch import Task
from agent.device.rollout import outcomes, shadow_windows
from agent.device.rollout.shadow_windows import Windows
from agent.device.store import labels as labelled
from agent.device.store.given import Given
from agent.device.store.message_log import Author
from agent.device.store.store import Batch, Store
from agent.drift.baseline.reference import Reference
from agent.errors import BadBundle, StorageBusy, StorageError, StorageFull
from agent.model import activation
from agent.model.inference import scores
from agent.model.inference.features import Floats
from agent.model.inference.inference import Answers
from agent.model.sandbox.subprocess_model import Apart

log = logging.getLogger("outstation")

STATE = "rollout beside"
# The longest that a batch is not told of; the longest that the next batch waits for an answer to the one before.
EVERY_S, PATIENCE_S = 300.0, 0.25
# Of a batch's time in a model that is in this process, and holds up the next one.
_MOST_S = 1.0
# After there was no room for a message.
_REST_S = 60.0
# First messages come often, so that a roll-out is soon judged by a few blocks; later ones seldom.
_SOON, _LATER, _FEW = 24, 20, 12
_MOST_BLOCKS = 64
# Answers that wait to be kept for labels, while there is no room.
_MOST_GIVEN = 20_000


class Kept(msgspec.Struct, frozen=True):
    """Of one roll-out and pair of bundles: the last row counted, the last label looked at, the messages so far.

    `blocks` are their tallies; of many, neighbours are added up.
    """

    rollout: str
    model: str
    beside: str
    row: int = 0
    number: int = 0
    messages: int = 0
    blocks: list[Tally] = []


class _Waiting(msgspec.Struct, frozen=True):
    """A batch that `other` is asked about: its rows, what `task` said, and the windows that were given."""

    rows: tuple[int, int]
    said: Said
    windows: Windows


class Beside:
    """`other` beside `task`, both of one name. Used by the main loop.

    A model of `other` that runs apart is never waited for longer than PATIENCE_S; batches that come meanwhile are not
    compared. One in this process answers at once.
    """

    def __init__(self, task: Task, other: Task, rollout: str, store: Store, batches: int = 20) -> None:
        """`batches`: the least that are compared before anything is judged."""
        self.task, self.other = task, other
        self.kept = _restored(store, task, other, rollout)
        self._least = batches
        self._tables = shadow_windows.tables([_reference(task), _reference(other)])
        self._waiting: _Waiting | None = None
        self._not_before_s = 0.0
        # Whether labels wait that did not go into the last message.
        self._more = False
        self._since_s: float | None = None
        self.tally, self._rows = Tally(), (0, 0)
        self._given: list[Given] = []

    @property
    def blocks(self) -> list[Block]:
        """One for each message so far, oldest first: what `verdict.judge` takes."""
        return [Block(one) for one in self.kept.blocks]

    def offer(self, store: Store, taken: Batch, answers: Answers) -> None:
        """A batch that `task` answered and committed. Raises StorageError, and nothing else."""
        last = taken.first + answers.cut.consumed - 1
        if last <= max(self.kept.row, self._rows[1]) or not len(answers.cut.starts):
            return
        self._guarded(lambda: self._ask(store, taken, answers, (taken.first, last)))

    def turn(self, store: Store, author: Author, now: Now) -> bool:
        """Hear what was asked, and say what is due; whether a message was written. Raises StorageError."""
        self.listen()
        if self._since_s is None:
            self._since_s = now.boot_s
        few = self.tally.batches < told_at_once(self.kept.messages, self._least)
        late = self._more or now.boot_s >= self._since_s + EVERY_S
        if now.boot_s < self._not_before_s or (few and not late):
            return False
        return self._say(store, author, now)

    def listen(self, within_s: float = 0.0) -> bool:
        """Take in the answer that is waited for, if it is there; whether none is waited for any more."""
        self._guarded(lambda: self._hear(within_s))
        return self._waiting is None

    def tell(self, store: Store, author: Author, now: Now) -> bool:
        """Say at once what was not said yet; whether there was any. Raises StorageError, also for want of room."""
        return self._tell(store, author, now, over=False)

    def finish(self, store: Store, author: Author, now: Now, *, over: bool = False) -> bool:
        """When the agent stops, or at the end (`over`): say what was not said yet. Raises StorageError."""
        self.listen(PATIENCE_S)
        self._waiting = None
        return self._say(store, author, now, over=over)

    # --- one batch ---

    def _ask(self, store: Store, taken: Batch, answers: Answers, rows: tuple[int, int]) -> None:
        model, ends = self.other.model, answers.cut.starts + self.task.window_rows - 1
        if isinstance(model, Apart):
            self._hear(PATIENCE_S)
            if not model.ready(PATIENCE_S):
                return
        found = shadow_windows.windows(self.other, store, taken, ends[: self._most()])
        said = shadow_windows.said(taken.first + ends, answers.scores, answers.seconds, self._tables[0])
        waiting = _Waiting(rows, said, found)
        if isinstance(model, Apart):
            model.ask(found.values)
            self._waiting = waiting
            # Mostly it is a matter of milliseconds, and then it is done.
            self._hear(0.0)
            return
        began_s = model.seconds
        with self.other.running():
            outputs = model.invoke(found.values)
        self._count(waiting, outputs, model.seconds - began_s)

    def _most(self) -> int | None:
        """How many windows of a batch: all, of a model that nobody waits for."""
        choice = self.other.choice
        if isinstance(self.other.model, Apart) or choice is None:
            return None
        return max(1, int(choice.rows_per_s * _MOST_S))

    def _hear(self, within_s: float) -> None:
        model = self.other.model
        if not isinstance(model, Apart) or not model.busy:
            # Whoever ended it meanwhile took the question along.
            self._waiting = None
            return
        began_s = model.seconds
        if (outputs := model.hear(within_s)) is not None:
            # What it was asked before it came to stand here says nothing.
            waiting, self._waiting = self._waiting, None
            if waiting is not None:
                self._count(waiting, outputs, model.seconds - began_s)

    def _count(self, waiting: _Waiting, outputs: Floats, seconds: float) -> None:
        manifest = self.other.bundle.manifest
        found = scores.of(outputs, manifest, waiting.windows.values)
        said = shadow_windows.said(waiting.windows.row, found, seconds, self._tables[1])
        kinds = shadow_windows.kind(self.task.bundle.manifest), shadow_windows.kind(manifest)
        self._add(tally.compared(kinds[0], waiting.said, kinds[1], said), waiting.rows)
        if self.task.keep_results and len(found):
            self._given.append(shadow_windows.given(self.other.bundle.digest, waiting.windows, found))
            while sum(len(one.row) for one in self._given) > _MOST_GIVEN:
                del self._given[0]

    def _guarded(self, action: Callable[[], None]) -> None:
        """What the other bundle does is counted, whatever it is, and ends nothing."""
        try:
            action()
        except StorageError:
            raise
        except Exception as error:
            if not isinstance(error, BadBundle):
                log.exception("task %s: %s beside it", self.task.name, self.other.bundle.manifest.name)
            rows = self._waiting.rows if self._waiting is not None else None
            self._waiting = None
            self._add(tally.failed(str(error) or type(error).__name__), rows)

    def _add(self, found: Tally, rows: tuple[int, int] | None) -> None:
        self.tally += found
        if rows is not None:
            self._rows = (self._rows[0] or rows[0], max(self._rows[1], rows[1]))

    # --- one message ---

    def _say(self, store: Store, author: Author, now: Now, *, over: bool = False) -> bool:
        try:
            return self._tell(store, author, now, over=over)
        except (StorageFull, StorageBusy) as problem:
            log.error("task %s: %s; what was compared is told later", self.task.name, problem)
            self._not_before_s = now.boot_s + _REST_S
            return False

    def _tell(self, store: Store, author: Author, now: Now, *, over: bool) -> bool:
        self._since_s = now.boot_s
        labels = store.ask(labelled.after, self.task.name, self.kept.number, outcomes.MOST + 1)
        self._more = len(labels) > outcomes.MOST
        if not self.tally.batches and not labels:
            return False
        return self._write(store, author, now, over=over)

    def _write(self, store: Store, author: Author, now: Now, *, over: bool) -> bool:
        name = self.task.name
        with store.transaction() as tx:
            if self._given:
                tx.labels.keep(labelled.beside(name), shadow_windows.joined(self._given), tx.uptime_s(now))
            by_labels, number = outcomes.count(tx, self.task, self.other, self.kept.number)
            block = self.tally + by_labels
            says = block != Tally()
            kept = self._after(block, number, says=says)
            if says:
                bundles = {"model": self.task.reference, "beside": self.other.reference}
                rows = [self._rows[0], self._rows[1]] if self._rows[1] else [kept.row or 1, kept.row or 1]
                body = {"rollout": kept.rollout, **bundles, "rows": rows, **block.body()}
                author.write(tx, "shadow", name, body, now)
            if not over:
                tx.keep(name, STATE, msgspec.msgpack.encode(kept))
        self.kept, self.tally, self._rows, self._given = kept, Tally(), (0, 0), []
        return says

    def _after(self, block: Tally, number: int, *, says: bool) -> Kept:
        old = self.kept
        blocks = thinned([*old.blocks, block]) if says else old.blocks
        row = max(old.row, self._rows[1])
        return Kept(old.rollout, old.model, old.beside, row, number, old.messages + says, blocks)


def told_at_once(messages: int, batches: int) -> int:
    """Of how many batches a message tells, after so many, where `batches` are the least that is compared."""
    each = max(1, batches // _FEW)
    return each if messages < _SOON else max(each, _LATER)


def thinned(blocks: list[Tally]) -> list[Tally]:
    """Neighbours added up, where there are more than are kept."""
    if len(blocks) <= _MOST_BLOCKS:
        return blocks
    return [sum(blocks[i : i + 2], Tally()) for i in range(0, len(blocks), 2)]


def _restored(store: Store, task: Task, other: Task, rollout: str) -> Kept:
    newest = store.ask(labelled.newest, task.name)
    fresh = Kept(rollout, task.bundle.digest, other.bundle.digest, number=newest)
    found = store.state(task.name, STATE)
    with suppress(msgspec.MsgspecError, ValueError):
        kept = fresh if found is None else msgspec.msgpack.decode(found, type=Kept)
        if (kept.rollout, kept.model, kept.beside) == (rollout, fresh.model, fresh.beside):
            return kept
    return fresh


def _reference(task: Task) -> Reference | None:
    with suppress(BadBundle):
        return activation.reference(task.bundle)
    return None
