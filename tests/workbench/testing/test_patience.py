"""Time limits of fault injection: a busy machine extends them, a free one does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from outstation.workbench.testing import patience
from outstation.workbench.testing.patience import Patience, wait_until


class Machine:
    """Machine at `now_s`, whose processes have waited `stalled_s` for a processor."""

    def __init__(self, folder: Path) -> None:
        self.now_s = self.computed_s = 0.0
        self.file = folder / "cpu"
        self.wait_for_processor(0.0)

    def wait_for_processor(self, stalled_s: float) -> None:
        self.file.write_text(
            f"some avg10=0.00 avg60=0.00 avg300=0.00 total={stalled_s * 1e6:.0f}\nfull avg10=0.00 total=7\n"
        )

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(patience, "_PRESSURE", made.file)
    clock = SimpleNamespace(monotonic=lambda: made.now_s, thread_time=lambda: made.computed_s, sleep=made.sleep)
    monkeypatch.setattr(patience, "time", clock)
    return made


@pytest.mark.parametrize(("stalled_s", "limit_s"), [(0, 60), (30, 87), (600, 600)])
def test_time_without_a_free_processor_counts_a_tenth(machine: Machine, stalled_s: float, limit_s: float) -> None:
    limit = Patience(60)
    machine.wait_for_processor(stalled_s)
    machine.now_s = limit_s - 1
    assert not limit.is_over()
    machine.now_s = limit_s + 1
    assert limit.is_over()
    limit.renew()
    assert not limit.is_over()


def test_a_kernel_without_pressure_and_a_limit_that_does_not_extend_count_all_time(machine: Machine) -> None:
    fixed, other = Patience(60, extends=False), Patience(60)
    machine.wait_for_processor(61)
    machine.now_s = 61
    assert (fixed.is_over(), other.is_over()) == (True, False)
    machine.file.unlink()
    assert other.is_over()


def test_a_wait_ends_with_its_event_or_says_how_long_it_took(machine: Machine) -> None:
    machine.wait_for_processor(100)
    wait_until("the time is near", lambda: machine.now_s >= 10, 60)
    assert machine.now_s == pytest.approx(10, abs=0.1)
    with pytest.raises(AssertionError, match="not within 60 s: the end"):
        wait_until("the end", lambda: False, 60)


@pytest.mark.parametrize(("computes_s", "seldom_s"), [(0.0, 0.05), (0.04, 0.12), (9.0, 0.5)])
def test_a_condition_that_computes_leaves_most_of_the_processor_to_what_it_waits_for(
    machine: Machine, computes_s: float, seldom_s: float
) -> None:
    polls_s = []

    def ask() -> bool:
        polls_s.append(machine.now_s)
        machine.computed_s += computes_s
        return len(polls_s) == 40

    wait_until("the last question", ask)
    assert polls_s[-1] - polls_s[-2] == pytest.approx(seldom_s)
