"""Fault harness: the oracle detects each kind of loss, and a few faults lose nothing."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from click.testing import CliRunner

from outstation.device.machine import secret_file
from outstation.fleet.database.ingest import Arrival
from outstation.protocol.wire.keys import load_private
from outstation.workbench.testing.messages import TIME, MessageSender, SignedMessage
from outstation.workbench.testing.patience import wait_until
from scripts import faults
from scripts.faults import Fault
from scripts.faults import __main__ as torture
from scripts.faults.oracle import Verdict, commit_rows, judge
from scripts.faults.producer import FIELDS, FIRST_T_US, STEP_US, Ledger, Producer
from scripts.faults.stamped import Dated, Stamped, Truth
from scripts.faults.world import DEVICE, TASKS, Setting, World
from scripts.kit.process_stats import cpu_s

ROOT = Path(__file__).parents[2]
# test_pipeline kills the daemon, broker and collector at random.
QUICK = ("die-before-commit", "clock-restored-after-power-cut", "power-cut", "update-killed-activated")
CONTROLS = ("control-normal-power-cut", "control-delete-on-puback", "control-clock-wrong-for-a-boot")


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a short name, since it holds a socket."""
    return tmp_path_factory.mktemp("world")


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_loses_nothing_and_doubles_nothing(name: str, folder: Path) -> None:
    outcome = torture.torture(faults.load()[name], 1, 1, folder)
    if outcome.skipped is not None:
        pytest.skip(outcome.skipped)
    assert outcome.passed, torture.row(outcome)
    assert outcome.verdicts[-1].acknowledged > 0


@pytest.mark.parametrize("name", CONTROLS)
def test_a_negative_control_detects_its_loss(name: str, folder: Path) -> None:
    outcome = torture.torture(faults.load()[name], 5, 1, folder)
    if outcome.skipped is not None:
        pytest.skip(outcome.skipped)
    assert outcome.passed, torture.row(outcome)
    document = outcome.document()
    assert document["lost"] or document["misdated"]


class MadeUp:
    """Evidence at a collector: `rows` rows sent and acknowledged, with any results."""

    def __init__(self, folder: Path, rows: int = 30) -> None:
        self.world = World(folder, Setting(), random.Random(0))
        self.ledger = Ledger()
        # The oracle reads only the ledger of a sensor.
        self.world.producer = cast(Producer, SimpleNamespace(ledger=self.ledger))
        secret_file.load_commitment_secret(self.world.device.data_dir, is_new=True)
        self.sender = MessageSender(DEVICE, load_private(self.world.device.home / "device.key"))
        chance = random.Random(1)
        for i in range(rows):
            t = FIRST_T_US + i * STEP_US
            self.ledger.values[t] = tuple(chance.gauss(0, 1) for _ in FIELDS)
            self.ledger.acknowledged.add(t)
        self.arrived: list[SignedMessage] = []

    def run(self, task: str, first: int, last: int, **changes: Any) -> SignedMessage:
        """Return the message of a run over these rows, as an honest device writes it."""
        times = list(self.ledger.values)[first - 1 : last]
        values = np.array([self.ledger.values[t] for t in times], np.float32).reshape(-1, len(FIELDS))
        listed = {"row": list(range(first, last + 1)), "t": times, "label": ["left"] * len(times)}
        body = {"columns": {**listed, "score": [0.5] * len(times)}, "n": len(times), **changes}
        self.sender.task = task
        place = {"log": self.sender.log, "task": task, "rows": [first, last]}
        proof = commit_rows(self.world, place, np.array(times, np.int64), values)
        return self.sender.results(rows_at=(first, last), stream="rig", **{"input": proof, **body})

    def arrive(self, *sent: SignedMessage) -> None:
        self.arrived += sent

    def verdict(self) -> Verdict:
        with self.world.fleet.open_store(write=True) as store:
            store.ingest([Arrival(self.sender.verify(message)) for message in self.arrived], [], TIME)
        verdict = Verdict()
        judge(self.world, verdict)
        return verdict


@pytest.fixture
def made(folder: Path) -> MadeUp:
    return MadeUp(folder)


def both(made: MadeUp, first: int, last: int) -> list[SignedMessage]:
    return [made.run(task, first, last) for task in TASKS]


def test_the_oracle_reports_nothing_for_sound_evidence(made: MadeUp) -> None:
    made.arrive(*both(made, 1, 10), *both(made, 11, 30))
    assert made.verdict() == Verdict(acknowledged=30)


def test_the_oracle_reports_rows_without_results(made: MadeUp) -> None:
    made.arrive(*both(made, 1, 10), made.run(TASKS[0], 11, 30), made.run(TASKS[1], 11, 23))
    verdict = made.verdict()
    assert (verdict.lost, verdict.declared, verdict.doubled) == (7, 0, 0)


def test_the_oracle_reports_a_gap_that_the_device_skipped(made: MadeUp) -> None:
    made.arrive(*both(made, 1, 10), *both(made, 13, 30))
    verdict = made.verdict()
    assert verdict.lost == 2
    assert any("audit" in problem for problem in verdict.problems)


def test_the_oracle_reports_a_missing_message(made: MadeUp) -> None:
    missing = both(made, 1, 10)
    made.arrive(*missing[1:], *both(made, 11, 30))
    verdict = made.verdict()
    assert verdict.lost == 10
    assert any("gaps" in problem and "'from': 1, 'to': 1" in problem for problem in verdict.problems)


def test_the_oracle_separates_declared_from_lost_rows(made: MadeUp) -> None:
    missing = both(made, 1, 10)
    rest = both(made, 11, 28)
    made.arrive(*rest, made.sender.evicted((missing[0].seq, missing[1].seq)))
    verdict = made.verdict()
    assert (verdict.lost, verdict.declared) == (2, 10)


def test_a_run_over_rows_that_cannot_be_read_declares_them(made: MadeUp) -> None:
    nothing = {"columns": {"row": [], "t": [], "label": [], "score": []}, "n": 0, "lost": "damaged", "input": ""}
    made.arrive(*both(made, 1, 10), *(made.run(task, 11, 15, **nothing) for task in TASKS), *both(made, 16, 30))
    verdict = made.verdict()
    assert (verdict.lost, verdict.declared, verdict.problems) == (0, 5, [])


def test_the_oracle_reports_rows_that_were_run_twice(made: MadeUp) -> None:
    made.arrive(*both(made, 1, 20), *both(made, 18, 30))
    verdict = made.verdict()
    assert verdict.doubled == 3
    assert verdict.problems


def test_the_oracle_finds_readings_that_were_altered(made: MadeUp) -> None:
    made.arrive(*both(made, 1, 10))
    t = list(made.ledger.values)[14]
    sent, made.ledger.values[t] = made.ledger.values[t], (9.0, 9.0, 9.0, 9.0)
    altered = both(made, 11, 30)
    made.ledger.values[t] = sent
    made.arrive(*altered)
    assert made.verdict().problems == ["2 runs are not over the rows that were sent"]


def test_the_oracle_finds_results_of_rows_that_nobody_sent(made: MadeUp) -> None:
    made.arrive(*both(made, 1, 30))
    last = list(made.ledger.values)[-1]
    del made.ledger.values[last]
    made.ledger.acknowledged.discard(last)
    assert sum("rows that nobody sent" in problem for problem in made.verdict().problems) == len(TASKS)


def test_the_oracle_finds_results_of_rows_that_were_refused(made: MadeUp) -> None:
    made.arrive(*both(made, 1, 30))
    refused = list(made.ledger.values)[3]
    made.ledger.acknowledged.discard(refused)
    made.ledger.refused.add(refused)
    assert sum("were refused" in problem for problem in made.verdict().problems) == len(TASKS)


def test_the_oracle_does_not_believe_a_signature_that_is_not_the_devices(made: MadeUp) -> None:
    made.arrive(*both(made, 1, 30))
    made.verdict()
    with made.world.fleet.open_store(write=True) as store, store.transaction() as db:
        altered = "CAST(replace(CAST(payload AS TEXT), 'left', 'rest') AS BLOB)"
        db.execute(f"UPDATE messages SET payload = {altered} WHERE seq = 1")
    made.arrived.clear()
    assert any("the audit fails" in problem for problem in made.verdict().problems)


@pytest.mark.parametrize(
    ("t_best", "error", "right"),
    [(5_000, 0, True), (6_000, 0, True), (4_990, 10, True), (6_010, 10, True), (4_989, 10, False), (6_011, 10, False)],
)
def test_a_row_is_misdated_where_its_true_time_is_outside_the_bound(t_best: int, error: int, right: bool) -> None:
    truth = Truth(rows=[(1_000, 2_000), (5_000, 6_000)])
    assert (truth.misdated([Dated(2, t_best, error, "anchored")]) == []) is right


def test_a_task_that_runs_more_often_than_it_is_due_is_noticed(made: MadeUp) -> None:
    sensor = Stamped(made.world, random.Random(0))
    made.world.companions.append(sensor)
    runs = made.world.folder / "clock" / "runs"
    runs.parent.mkdir()
    made.arrive(*both(made, 1, 30))
    runs.write_text("stamped\n" * 2)
    assert made.verdict().problems == []
    runs.write_text("stamped\n" * 200)
    made.arrived.clear()
    [problem] = made.verdict().problems
    assert problem.startswith("198 runs of a task that was due ")


def test_processor_time_is_that_of_all_threads_of_the_process() -> None:
    busy = "import threading\nfor _ in range(2): threading.Thread(target=lambda: sum(range(10**9))).start()"
    with subprocess.Popen([sys.executable, "-c", busy]) as process:
        try:
            wait_until("a tenth of a second of work", lambda: cpu_s(process.pid) > 0.1)
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("verdict", "passed", "with_damage", "as_control"),
    [
        (Verdict(acknowledged=9), True, True, False),
        (Verdict(acknowledged=9, lost=1), False, False, True),
        (Verdict(acknowledged=9, misdated=1), False, False, True),
        (Verdict(acknowledged=9, declared=1), False, True, True),
        (Verdict(acknowledged=9, doubled=1), False, False, False),
        (Verdict(acknowledged=9, problems=["x"]), False, False, False),
    ],
)
def test_a_fault_passes_without_loss_and_a_control_with_one(
    verdict: Verdict, passed: bool, with_damage: bool, as_control: bool
) -> None:
    def outcome(name: str, *, damages: bool = False) -> bool:
        fault = Fault(name, lambda world, rng: None, damages=damages)
        return torture.Outcome(fault, 1, [Verdict(acknowledged=5), verdict]).passed

    outcomes = (outcome("made-up"), outcome("made-up", damages=True), outcome("control-made-up"))
    assert outcomes == (passed, with_damage, as_control)


def test_equal_seeds_make_equal_choices_and_others_differ(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    class Nowhere(World):
        def __enter__(self) -> World:
            return self

        def resume(self) -> None:
            drawn.append(self.rng.random())

    monkeypatch.setattr(torture, "World", Nowhere)
    monkeypatch.setattr(torture, "settle", lambda world, patience_s, **_: Verdict())
    choosing = Fault("choosing", lambda world, rng: drawn.append(rng.random()))

    def choices(seed: int) -> list[float]:
        drawn.clear()
        torture.torture(choosing, 3, seed, folder / str(len(list(folder.iterdir()))))
        return list(drawn)

    first, again, other = choices(7), choices(7), choices(8)
    assert first == again
    assert not set(first) & set(other)


def test_no_fault_draws_from_anything_but_its_seed() -> None:
    drawing = re.compile(
        r"SystemRandom|secrets\.|urandom|\brandom\.(?:random|uniform|rand\w+|choices?|sample|shuffle)\("
    )
    modules = {
        path.name for path in (ROOT / "scripts/faults").glob("on_*.py") if drawing.search(path.read_text("utf-8"))
    }
    assert not modules


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Run `scripts/torture` with three faults, the first of which ends last."""
    done: list[str] = []

    def quick(fault: Fault, rounds: int, seed: int, keep: bool) -> torture.Outcome:
        while fault.name == "first" and len(done) < 2:
            pass
        done.append(fault.name)
        return torture.Outcome(fault, seed, [Verdict(acknowledged=1)])

    known = {n: Fault(n, lambda world, rng: None) for n in ("first", "second", "third")}
    monkeypatch.setattr(torture, "_one", quick)
    monkeypatch.setattr(faults, "load", lambda: known)
    yield lambda *arguments: CliRunner().invoke(torture.main, arguments)
    assert done[-1] == "first"


def test_faults_side_by_side_are_reported_in_the_order_of_the_list(three: Callable[..., Any]) -> None:
    result = three("--all", "--jobs", "3", "--json")
    assert result.exit_code == 0, result.output
    assert [entry["fault"] for entry in json.loads(result.output)] == ["first", "second", "third"]


def test_every_fault_has_a_row_in_the_documentation() -> None:
    assert list(faults.load()) == list(faults.read_table())
    lines = [line for line in faults.TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(lines) == len(faults.load())
