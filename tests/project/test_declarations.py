from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.faults.declarations import Declarations
from tests.kit.devices import expand_columns

TASK, OTHER = "often", "in-tens"
T0 = 1_000


class Log:
    """Messages of one log as the collector has them; row n has time T0 + n."""

    def __init__(self, name: str = "a") -> None:
        self.name, self.seq = name, 0
        self.sent: list[bytes] = []

    def run(self, first: int, last: int, *, task: str = TASK, lost: str | None = None, shift: int = 0) -> Log:
        rows = [] if lost else list(range(first, last + 1))
        columns = {"row": rows, "t": [T0 + row + shift for row in rows]}
        return self._add("results", task=task, rows=[first, last], columns=columns, **({"lost": lost} if lost else {}))

    def event(self, event: str, **evidence: Any) -> Log:
        return self._add("audit", event=event, evidence=evidence)

    def opened(self, newest: int) -> Log:
        return self._add("alerts", alert="storage", evidence={"newest": {"rig": newest}})

    def skip_seq(self, n: int = 1) -> Log:
        self.seq += n
        return self

    def _add(self, kind: str, **body: Any) -> Log:
        self.seq += 1
        self.sent.append(json.dumps({"kind": kind, "log": self.name, "seq": self.seq, **body}).encode())
        return self


def undeclared(last: int, *logs: Log, task: str = TASK, forgetful: bool = False) -> int:
    """Return how many of the acknowledged rows 1 to `last` have neither a result nor a declaration."""
    payloads = [payload for log in logs for payload in log.sent]
    sent = [T0 + row for row in range(1, last + 1)]
    bodies = [json.loads(payload) for payload in payloads]
    results = [body for body in bodies if body["kind"] == "results" and body["task"] == task]
    arrived = {t for body in results for t in expand_columns(body["columns"])["t"]}
    return Declarations(payloads, (TASK, OTHER), forgetful=forgetful).undeclared(task, set(sent) - arrived, sent)


def test_rows_without_a_result_are_undeclared() -> None:
    assert undeclared(30, Log().run(1, 10).run(21, 30)) == 10
    assert undeclared(30, Log().run(11, 20)) == 20
    assert undeclared(30, Log()) == 30


def test_the_newest_stored_row_declares_what_the_medium_lost() -> None:
    log = Log().run(1, 10).opened(10).run(11, 20, shift=10)
    assert undeclared(30, log, forgetful=True) == 0
    assert undeclared(30, log) == 10
    assert undeclared(30, Log().run(1, 10).opened(20).run(11, 20, shift=10), forgetful=True) == 10
    assert undeclared(30, Log().run(1, 20).opened(20), forgetful=True) == 0
    assert undeclared(30, Log().run(1, 20).opened(19), forgetful=True) == 10


def test_a_lost_run_declares_its_rows_for_its_task_only() -> None:
    log = Log().run(1, 10).run(11, 20, lost="damaged").run(21, 30)
    log.run(1, 10, task=OTHER).run(21, 30, task=OTHER)
    assert undeclared(30, log) == 0
    assert undeclared(30, log, task=OTHER) == 10


def test_evicted_readings_are_declared_for_the_tasks_that_are_named() -> None:
    log = Log().run(1, 10).event("evicted", stream="rig", rows=[[11, 18]], tasks=[TASK]).run(21, 30)
    assert undeclared(30, log) == 2
    log.run(1, 10, task=OTHER).run(21, 30, task=OTHER)
    assert undeclared(30, log, task=OTHER) == 10


def test_evicted_readings_that_were_used_excuse_no_result() -> None:
    assert undeclared(30, Log().run(1, 10).event("evicted", rows=[[11, 20]], used=True, tasks=[]).run(21, 30)) == 10


@pytest.mark.parametrize(("evicted", "left"), [([[2, 2]], 0), ([[1, 1]], 10), ([[4, 9]], 10), ([], 10)])
def test_evicted_messages_declare_the_rows_between_the_runs_around_them(evicted: list[Any], left: int) -> None:
    log = Log().run(1, 10).skip_seq().run(21, 30).event("evicted", seq=evicted)
    assert undeclared(30, log) == left


def test_evicted_messages_at_the_end_and_at_the_beginning_count_too() -> None:
    assert undeclared(30, Log().run(1, 10).skip_seq(2).event("evicted", seq=[[2, 3]])) == 0
    assert undeclared(30, Log().skip_seq().run(11, 30).event("evicted", seq=[[1, 1]])) == 0


def test_a_new_log_declares_the_rows_between_the_old_one_and_itself() -> None:
    old = Log("a").run(1, 10)
    assert undeclared(30, old, Log("b").event("new log", old="a").run(16, 25, shift=5)) == 0
    assert undeclared(30, old, Log("b").event("started").run(16, 25, shift=5)) == 10
    assert undeclared(30, old, Log("b").event("new log", old="a")) == 0
    # Rows missing inside one log are not covered.
    assert undeclared(30, old, Log("b").event("new log", old="a").run(11, 20).run(26, 30)) == 5


def test_a_new_log_declares_the_rows_of_an_old_one_that_never_arrived() -> None:
    assert undeclared(30, Log("b").event("new log", old="a").run(21, 30)) == 0
    assert undeclared(30, Log("b").event("new log", old="a")) == 0
    assert undeclared(30, Log("b").event("new log", old="a").run(11, 15).run(21, 30)) == 5
    assert undeclared(30, Log("b").event("new log", old="a").run(11, 20)) == 10


def test_a_new_log_declares_the_rows_after_the_old_one() -> None:
    old = Log("a").run(1, 10).run(11, 20)
    again = Log("b").event("new log", old="a").run(11, 20)
    assert undeclared(30, old, again) == undeclared(30, again, old) == 0
    assert undeclared(30, old, Log("b").event("new log", old="a").run(21, 30, lost="damaged")) == 0
    assert undeclared(30, old, Log("b").event("started").run(11, 20)) == 10


def doubled(*results: tuple[str, int, float], follows: str = "b") -> int:
    logs = [Log(name).event("new log" if name in follows else "started", old="a") for name in "abc"]
    rows = [(T0 + row, log, row, "ok", score, None) for log, row, score in results]
    return Declarations([payload for log in logs for payload in log.sent], (TASK,)).doubled(rows)


def test_a_second_result_of_a_row_is_one_too_many() -> None:
    assert doubled(("a", 1, 0.5), ("a", 2, 0.5)) == 0
    assert doubled(("a", 1, 0.5), ("a", 1, 0.5), ("a", 1, 0.5)) == 2
    assert doubled(("a", 1, 0.5), ("c", 1, 0.5)) == 1
    assert doubled(("b", 1, 0.5), ("b", 1, 0.5)) == 1


def test_a_log_of_an_old_copy_may_repeat_a_result_but_not_change_it() -> None:
    assert doubled(("a", 1, 0.5), ("b", 1, 0.5)) == 0
    assert doubled(("a", 1, 0.5), ("b", 1, 0.6)) == 1
    assert doubled(("a", 1, 0.5), ("b", 1, 0.5), ("c", 1, 0.5), follows="bc") == 0


@given(retained=st.sets(st.integers(1, 40)), named=st.sets(st.integers(1, 40)))
def test_no_more_rows_are_declared_than_the_messages_name(retained: set[int], named: set[int]) -> None:
    log = Log().event("evicted", rows=[[row, row] for row in sorted(named)])
    for row in sorted(retained):
        log.run(row, row)
    absent = set(range(1, 41)) - retained
    assert undeclared(40, log) == len(absent - named)


def test_results_that_arrive_while_the_oracle_looks_are_not_missing() -> None:
    log = Log().run(1, 10).run(11, 20)
    sent = [T0 + row for row in range(1, 21)]
    assert Declarations(log.sent, (TASK,)).undeclared(TASK, set(sent[10:]), sent) == 0
