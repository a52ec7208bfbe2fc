"""Command `python -m scripts.faults.cuts`: power cuts of a store at every write of its journal and of its commits.

A round commits rows at random: a few, many, with messages, with failures between. At each write a copy of the folder is
taken as a power cut would leave it: of what was not flushed, each sector of 512 bytes is old or new. Some copies get a
flipped bit in the journal, too. Each copy is read beside and then opened, twice; it must have every acknowledged row
exactly once, or, after a flip, declare those that it lacks.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import click
import msgspec
import numpy as np

from outstation.device.recovery import catch_up, findings
from outstation.device.recovery.open import open_store
from outstation.device.store import journal, small_commits
from outstation.device.store.journal import Journal
from outstation.device.store.rows import Rows
from outstation.device.store.store import DATABASE, Store
from outstation.foundation.errors import StorageError, StorageFull
from scripts.faults.disk import flip_bit
from scripts.kit.stores import MODES, append_message, declared_numbers, opened, outbox_payloads, pulled, served

_SECTOR = 512
_SOURCE, _ITEM, _COUNTER = "files", "a.csv", "lines rejected"


class PowerCut(msgspec.Struct, frozen=True):
    """Folder as a power cut left it, after `acknowledged` rows; the commit under way ends at row `attempted`."""

    folder: Path
    acknowledged: int
    attempted: int
    place: str


class Round:
    """Store that is written to, and the copies that its power cuts left."""

    def __init__(self, folder: Path, random: Random, *, share: float, max_size: int) -> None:
        self._folder, self._random, self._share = folder, random, share
        self._numbers = itertools.count(1)
        self.cuts: list[PowerCut] = []
        self.acknowledged = self.attempted = 0
        self.max_size = max_size
        self.store, self.log = opened(folder / "live", max_size=max_size)

    @property
    def live(self) -> Path:
        return self._folder / "live"

    def cut(self, place: str, *, file: str = "", before: bytes = b"", always: bool = False) -> None:
        """Copy the folder; in `file`, which was `before`, unflushed sectors are old or new."""
        if not always and self._random.random() > self._share:
            return
        to = pulled(self.live, self._folder / f"cut {next(self._numbers)}")
        if file:
            mix(to / file, before, self._random)
        self.cuts.append(PowerCut(to, self.acknowledged, self.attempted, place))

    def commit(self, n: int) -> None:
        """Commit `n` rows, a source position and a count, as the intake does."""
        first = self.acknowledged + 1
        self.attempted = self.acknowledged + n
        values = np.arange(first, first + n, dtype=np.int64)
        with self.store.transaction(small=True) as tx:
            texts = [MODES[int(value) % 2] for value in values]
            codes = tx.assign_category_codes("numbers", "mode", texts, limit=1000, last_row=first + n - 1)[0]
            tx.append("numbers", Rows(values * 1000, (values, np.array(codes, np.uint16))), "synced")
            tx.set_latest_time("numbers", int(values[-1]) * 1000)
            tx.set_source_position(_SOURCE, _ITEM, first + n - 1)
            tx.increment_counter(_COUNTER, n)
        self.acknowledged = self.attempted
        if self.store.last_row("numbers") != self.acknowledged:
            raise AssertionError(f"the store shows row {self.store.last_row('numbers')}, not {self.acknowledged}")

    def fail(self) -> None:
        """Begin a commit that fails: in the code, for want of room, or after SQLite has rolled back everything."""
        kind = self._random.randrange(3)
        first = self.acknowledged + 1
        values = np.arange(first, first + 3, dtype=np.int64)
        with contextlib.suppress(ZeroDivisionError, StorageFull), self.store.transaction(small=True) as tx:
            tx.append("numbers", Rows(values, (-values, np.zeros(3, np.uint16))), "synced")
            if kind == 0:
                raise ZeroDivisionError
            if kind == 1:
                tx.connection.execute("ROLLBACK")
                raise StorageFull("as SQLite says")
            tx.save_state("judge", "drift", bytes(self.max_size))

    def step(self) -> None:
        kind = self._random.random()
        if kind < 0.8:
            self.commit(self._random.randint(1, 40))
        elif kind < 0.82:
            # The usual rhythm of a slow stream: a commit, then a batch.
            self.commit(200)
            self.store.fold()
        elif kind < 0.83:
            self.commit(self._random.choice((300, 1000)))
        elif kind < 0.88:
            append_message(self.store, self.log, f"message after {self.acknowledged}")
        elif kind < 0.93:
            with self.store.transaction(vital=True) as tx:
                # Nothing: such a transaction must not take the small commits to the database.
                tx.delete_state("judge", "nothing")
        elif kind < 0.97:
            self.fail()
        else:
            self.cut("between two commits", always=True)
            self.store.close()
            self.store, self.log = opened(self.live, max_size=self.max_size)


def mix(file: Path, before: bytes, random: Random) -> None:
    """Make each sector that differs old or new: none, all, a part in order, or any."""
    after = file.read_bytes()
    before = before.ljust(len(after), b"\0")
    changed = [at for at in range(0, len(after), _SECTOR) if after[at : at + _SECTOR] != before[at : at + _SECTOR]]
    kind = random.randrange(4)
    if kind == 0:
        written = set[int]()
    elif kind == 1:
        written = set(changed)
    elif kind == 2:
        written = set(changed[: random.randint(0, len(changed))])
    else:
        written = {at for at in changed if random.random() < 0.5}
    content = bytearray(before[: len(after)])
    for at in written:
        content[at : at + _SECTOR] = after[at : at + _SECTOR]
    file.write_bytes(content)


@contextlib.contextmanager
def cutting(this: Round) -> Iterator[None]:
    """Cut the power before, in and after each write of the journal, and each commit of the database."""
    append, commit_all = Journal.append, small_commits.SmallCommits._commit_all

    def cut_append(self: Journal, body: bytes) -> None:
        file = this.live / journal.FILE_NAME
        before = file.read_bytes()
        this.cut("before the journal is written", file=journal.FILE_NAME, before=before)
        append(self, body)
        this.cut("while the journal is written", file=journal.FILE_NAME, before=before)

    def cut_commit(self: Any) -> None:
        wal = this.live / f"{DATABASE}-wal"
        before = wal.read_bytes() if wal.exists() else b""
        held = (this.live / journal.FILE_NAME).read_bytes()
        commit_all(self)
        if (this.live / journal.FILE_NAME).read_bytes() != held:
            raise AssertionError("the database's commit wrote to the journal")
        this.cut("while the database commits", file=wal.name, before=before)

    Journal.append, small_commits.SmallCommits._commit_all = cut_append, cut_commit  # type: ignore[method-assign]
    try:
        yield
    finally:
        Journal.append, small_commits.SmallCommits._commit_all = append, commit_all  # type: ignore[method-assign]


# --- what a copy must hold ---


def check(cut: PowerCut, random: Random, max_size: int) -> str:
    """Return what is wrong with a copy, or an empty text."""
    flipped = random.random() < 0.2
    if flipped:
        flip_bit(cut.folder / journal.FILE_NAME, random.randrange(8 * journal.SIZE))
    problem = "" if flipped else _check_reader(cut)
    kills = 0 if random.random() < 0.7 else 1
    for _ in range(kills):
        _kill_at_opening(cut.folder, max_size)
    return problem or _check_opened(cut, max_size, flipped=flipped) or _check_opened(cut, max_size, flipped=flipped)


def _check_reader(cut: PowerCut) -> str:
    """Check what a process sees that only reads, before any opening."""
    with Store.open_read_only(cut.folder) as store:
        last, rows = store.last_row("numbers"), served(store)
        counts = store.source_position(_SOURCE, _ITEM), store.counters().get(_COUNTER, 0)
    if not cut.acknowledged <= last <= cut.attempted or counts != (last, last):
        return f"a reader sees row {last} and {counts} of {cut.acknowledged} acknowledged rows"
    return "" if rows == {n: n for n in range(1, last + 1)} else f"a reader is served {len(rows)} of {last} rows"


def _kill_at_opening(folder: Path, max_size: int) -> None:
    """Open, and die before the first transaction is committed."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    repair = catch_up.catch_up
    catch_up.catch_up = die  # type: ignore[assignment]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            open_store(folder, max_size=max_size)
    finally:
        catch_up.catch_up = repair


def _check_opened(cut: PowerCut, max_size: int, *, flipped: bool) -> str:
    try:
        store, _ = opened(cut.folder, max_size=max_size)
    except StorageError as error:
        return f"does not open: {error}"
    try:
        last, rows, messages = store.last_row("numbers"), served(store), outbox_payloads(store)
        if any(number != value for number, value in rows.items()):
            return "a row is served as another one"
        if not cut.acknowledged <= last <= cut.attempted:
            return f"the last row is {last}, of {cut.acknowledged} acknowledged and {cut.attempted} attempted ones"
        missing = set(range(1, last + 1)) - rows.keys()
        if flipped:
            undeclared = missing - declared_numbers(messages, "rows", "numbers") - _reported(messages)
            return f"rows {sorted(undeclared)[:5]} are lost without a word" if undeclared else ""
        if missing:
            return f"rows {sorted(missing)[:5]} are lost"
        counts = store.source_position(_SOURCE, _ITEM), store.counters().get(_COUNTER, 0)
        if counts != (last, last):
            return f"position and count are {counts} at row {last}"
        if store.last_row("others"):
            return "another stream has rows"
        finding = store.get_meta(findings.LAST_FINDING, "")
        return f"a finding, though nothing is damaged: {finding}" if finding else ""
    finally:
        store.close()


def _reported(messages: dict[int, dict[str, Any]]) -> set[int]:
    """Return the rows of "numbers" that alerts name as lost; no task has used them."""
    listed = [body["evidence"].get("rows", {}) for body in messages.values() if body["kind"] == "alerts"]
    return {row for rows in listed for first, last in rows.get("numbers", []) for row in range(first, last + 1)}


def run_round(folder: Path, seed: int, *, steps: int = 60, share: float = 0.3) -> list[str]:
    """Run one round, and return what its power cuts lost."""
    random = Random(seed)
    max_size = random.choice((1 << 20, 8 << 20))
    this = Round(folder, random, share=share, max_size=max_size)
    try:
        with cutting(this):
            for _ in range(steps):
                this.step()
        if served(this.store) != {n: n for n in range(1, this.acknowledged + 1)}:
            return ["the store itself has lost rows"]
    finally:
        this.store.close()
    problems = []
    for cut in this.cuts:
        if problem := check(cut, random, max_size):
            problems.append(f"seed {seed}, {cut.place}, {cut.folder.name}: {problem}")
        else:
            shutil.rmtree(cut.folder)
    return problems


@click.command()
@click.option("--rounds", default=200, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=1, show_default=True, help="Seed of the first round.")
def main(rounds: int, seed: int) -> None:
    """Cut the power of a store at its writes. Exit code 1 if a round lost an acknowledged row."""
    logging.disable()
    violations = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        for number in range(seed, seed + rounds):
            # At once: a long run may be interrupted.
            for problem in run_round(Path(folder) / str(number), number):
                violations += 1
                click.echo(problem)
            shutil.rmtree(Path(folder) / str(number))
    click.echo(f"{rounds} rounds, {violations} violations")
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
