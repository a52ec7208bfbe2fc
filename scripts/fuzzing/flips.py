"""Command `python -m scripts.fuzzing.flips`: one flipped bit in a file of a device's store or of a fleet's database.

Each flip hits a copy. Every command that reads the copy must end in one line. Then the store is opened as the daemon
does: each row and each message that was there is still there, or is declared as lost; nothing is served as something
else. A fleet's database must give the same answers as before, or its audit must fail.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import click

from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.fleet.audit.audit import audit
from outstation.fleet.database.store import FleetStore
from outstation.foundation.errors import OutstationError, StorageDamaged
from scripts.faults.disk import flip_bit
from scripts.fuzzing import site
from scripts.fuzzing.malformed import run_command
from scripts.kit.stores import (
    NUMBERS,
    append,
    append_message,
    declared_numbers,
    filled,
    opened,
    outbox_payloads,
    pulled,
    put_aside,
    served,
)

ROWS, MESSAGES, ACKNOWLEDGED, CURSOR = 400, 30, 8, 150
_PAGE = 4096
_STORE_COMMANDS = ("status", "cost", "head")
_FLEET_COMMANDS = ("devices", "alerts --all", "audit --json", "log gaps", "drift")


@dataclass(frozen=True, slots=True)
class Flip:
    """One bit of a file, counted from its beginning."""

    file: str
    bit: int

    def __str__(self) -> str:
        return f"{self.file} bit {self.bit} (page {self.bit // 8 // _PAGE + 1}, byte {self.bit // 8 % _PAGE})"


Run = Callable[[Path, Random, int], Iterator[tuple[Flip, str]]]


def choose(folder: Path, random: Random, count: int) -> Iterator[Flip]:
    """Yield flips over all files of a folder: as many in each file, and in used bytes rather than in empty ones."""
    files = sorted(
        p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and p.name not in ("lock", "reserve")
    )
    for number in range(count):
        file = files[number % len(files)]
        data = file.read_bytes()
        for _ in range(50):
            at = random.randrange(len(data))
            if any(data[max(0, at - 8) : at + 8]):
                break
        yield Flip(str(file.relative_to(folder)), 8 * at + random.randrange(8))


# --- the store of a device ---


def build_stores(folder: Path) -> list[Path]:
    """Make a store after a clean stop, one after a power cut, and one whose newest commits are in its log only."""
    store, _ = filled(folder / "live")
    # What a power cut may take is noticed by what it takes with it: rows or messages.
    append(store, "others", 10)
    emptied = pulled(folder / "live", folder / "emptied", store, emptied=True)
    store.close()
    clean = pulled(folder / "live", folder / "clean")
    store, _ = filled(folder / "log")
    append(store, "others", 10)
    logged = pulled(folder / "log", folder / "logged")
    store.close()
    return [clean, emptied, logged]


def check_store(folder: Path) -> str:
    """Return what a damaged store has lost without a word, or an empty text.

    Damage that is found when something is read is repaired at the next opening, as the daemon does.
    """
    for _ in range(3):
        try:
            return _check_opened(*opened(folder))
        except StorageDamaged:
            continue
        except OutstationError as error:
            return f"does not open: {error}"
    return "is still damaged after three openings"


def _check_opened(store: Store, message_log: MessageLog) -> str:
    try:
        put_aside(store, message_log)
        rows, messages = served(store), outbox_payloads(store)
        if any(number != value for number, value in rows.items()):
            return "a row is served as another one"
        if any(body["seq"] != seq for seq, body in messages.items()):
            return "a message is served as another one"
        new_log = bool(store.get_meta("previous log", ""))
        old = {seq for seq, body in messages.items() if not new_log and seq <= MESSAGES}
        lost_messages = set(range(ACKNOWLEDGED + 1, MESSAGES + 1)) - old - declared_numbers(messages, "seq")
        summaries = " ".join(str(body.get("summary")) for body in messages.values())
        if new_log:
            lost_messages = {n for n in range(ACKNOWLEDGED + 1, MESSAGES + 1) if f"message {n} " not in summaries}
            lost_messages = set() if "was damaged" in summaries else lost_messages
        if lost_messages:
            return f"messages {sorted(lost_messages)[:5]} are lost without a word"
        is_repaired = "damaged" in summaries or "went back in time" in summaries
        cursor = store.cursor("judge") or 0
        declared = declared_numbers(messages, "rows", "numbers")
        lost = set(range(1, ROWS + 1)) - rows.keys()
        # A damaged chunk that no task needs any more is named to its reader.
        if undeclared := {row for row in lost if row <= cursor} - declared - named_rows(store):
            return f"used rows {sorted(undeclared)[:5]} are lost without a word"
        if cursor != CURSOR and not is_repaired:
            return f"the cursor is {cursor}, not {CURSOR}"
        if cursor > CURSOR:
            return f"rows {CURSOR + 1} to {cursor} are skipped"
        if store.last_row("numbers") < ROWS:
            return f"the last row is {store.last_row('numbers')}: a number will be given twice"
        if store.source_position("files", "a.csv") != 17 and not is_repaired:
            return "a source position is lost without a word"
        if store.load_state("judge", "drift") != b"state" and not is_repaired:
            return "a task's state is lost without a word"
        append(store, "numbers", 10)
        append_message(store, message_log, "goes on")
    finally:
        store.close()
    return ""


def named_rows(store: Store) -> set[int]:
    """Return the rows whose chunk is there, but named as damaged when it is read."""
    named: set[int] = set()
    after = 0
    while (batch := store.read_rows("numbers", NUMBERS.fields, after, 1000)) is not None:
        if batch.loss_reason and "CRC" in batch.loss_reason:
            named |= set(range(batch.first, batch.last + 1))
        after = batch.last
    return named


def flip_stores(folder: Path, random: Random, count: int) -> Iterator[tuple[Flip, str]]:
    """Flip a bit of a store, and check what it says and holds then."""
    stores = build_stores(folder / "made")
    config = folder / "device" / "outstation.toml"
    with contextlib.redirect_stdout(io.StringIO()):
        site.run("init", config.parent, "--id", "pi-07", "--data-dir", folder / "case")
    config.write_text(
        config.read_text(encoding="utf-8").split("[streams.")[0].replace('fleet = "home"', 'fleet = "acme"')
        + '[streams.numbers]\nfields = [{ name = "n", type = "i64" }, { name = "mode", type = "category" }]\n',
        encoding="utf-8",
    )
    chosen = [choose(store, random, count) for store in stores]
    for number in range(count):
        flip = next(chosen[number % len(stores)])
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(stores[number % len(stores)], case)
        flip_bit(case / flip.file, flip.bit)
        command = _STORE_COMMANDS[number % len(_STORE_COMMANDS)]
        problem = run_command([command, "-c", str(config)]).problem
        yield flip, problem or check_store(case)


# --- the database of a fleet ---


def answers(database: Path) -> dict[str, object]:
    """Return what the database says to its readers."""
    with FleetStore(database, read_only=True) as store:
        return {
            "alerts": store.alerts(closed=True),
            "gaps": store.gaps(),
            "logs": store.logs(),
            "keys": store.enrolled_keys(),
            "messages": [tuple(row[:7]) for row in store.evidence()],
        }


def check_database(database: Path, before: dict[str, object]) -> str:
    """Return what a damaged database says wrongly without its audit failing, or an empty text."""
    try:
        after = answers(database)
        store = FleetStore(database, read_only=True)
    except OutstationError:
        return ""
    try:
        passed = audit(store).passed
    except OutstationError:
        return ""
    finally:
        store.close()
    wrong = [name for name in before if after[name] != before[name] and name != "keys"]
    return f"{', '.join(wrong)} differ, and the audit passes" if passed and wrong else ""


def flip_databases(folder: Path, random: Random, count: int) -> Iterator[tuple[Flip, str]]:
    """Flip a bit of a fleet's database, and check what it says then."""
    with contextlib.redirect_stdout(io.StringIO()):
        fleet = site.build_fleet(folder / "fleet")
    made = folder / "database"
    made.mkdir()
    shutil.copy(fleet / "fleet.db", made)
    before = answers(made / "fleet.db")
    for number, flip in enumerate(choose(made, random, count)):
        case = folder / "case.db"
        for file in folder.glob("case.db*"):
            file.unlink()
        shutil.copy(made / flip.file, case)
        flip_bit(case, flip.bit)
        words = [*_FLEET_COMMANDS[number % len(_FLEET_COMMANDS)].split(), "--dir", str(fleet), "--db", str(case)]
        problem = run_command(["fleet", *words]).problem
        yield flip, problem or check_database(case, before)


@click.command()
@click.option("--flips", default=2000, show_default=True, help="Number of flips: two thirds in stores.")
@click.option("--seed", default=1, show_default=True)
@click.option("--part", type=click.Choice(["stores", "databases"]), help="Only these.")
def main(flips: int, seed: int, part: str | None) -> None:
    """Flip bits, one at a time; exit code 1 if one led to a traceback or to an undeclared loss."""
    logging.disable()
    kinds = {"stores": (flip_stores, flips * 2 // 3), "databases": (flip_databases, flips - flips * 2 // 3)}
    failed = 0
    for name, (run, count) in kinds.items():
        if part in (None, name):
            with tempfile.TemporaryDirectory(prefix="f") as folder:
                count = flips if part else count
                for flip, problem in run(Path(folder), Random(seed), count):
                    failed += bool(problem)
                    if problem:
                        click.echo(f"--- {flip}: {problem}")
            click.echo(f"{name}: {count} flips")
    click.echo(f"{failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
