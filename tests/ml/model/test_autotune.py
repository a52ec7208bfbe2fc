"""The trial finds a fast size in two seconds, never one that changes an answer, and is not made twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from outstation.foundation.errors import BadBundle
from outstation.ml.model.bundle.tensor_selection import TensorSelection
from outstation.ml.model.inference import tuning
from outstation.ml.model.inference.runtime import TfliteModel
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.ml.model.inference.tuning import MAX_TUNING_S, Tuning
from outstation.ml.model.sandbox import autotune, memory, probe
from scripts.kit.bundles import CLASSIFY, Recipe, around, model

PLENTY = 1 << 30
# So that a busy machine leaves nothing out; a trial that has settled ends before.
MINUTE_S = 60.0
SUMS = TensorSelection(outputs=("sums",))


def rows(name: str, count: int = autotune.SAMPLE_ROWS) -> Any:
    shape = TfliteModel(model(name)).input_shape
    return np.random.default_rng(1).normal(0, 1, (count, *shape)).astype(np.float32)


def tried(name: str, most_bytes: int = PLENTY, seconds: float = MAX_TUNING_S) -> Tuning:
    return autotune.tune(model(name), rows(name), most_bytes, seconds)


class Slow(TfliteModel):
    """Takes as long for each run and each row as the class says, by the clock `clock_s`; `unequal` batches give other
    bits.
    """

    run_s, row_s = 0.0, 0.0
    gain = 1.0
    unequal: tuple[int, ...] = ()
    runs = 0
    clock_s = 0.0

    def _run_batch(self, part: Any) -> Any:
        type(self).runs += 1
        type(self).clock_s += self.run_s + self.row_s * len(part) / (self.gain if self.threads > 1 else 1.0)
        out = super()._run_batch(part)
        return out + np.float32(1e-6) if len(part) in self.unequal else out


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[Slow]:
    class Made(Slow):
        pass

    clock = SimpleNamespace(perf_counter=lambda: Made.clock_s, thread_time=lambda: Made.clock_s)
    monkeypatch.setattr(autotune, "time", clock)
    monkeypatch.setattr(autotune, "TfliteModel", Made)
    monkeypatch.setattr(autotune, "count_cores", lambda: 2)
    monkeypatch.setattr("outstation.ml.model.inference.runtime.os.cpu_count", lambda: 2)
    return Made


def test_where_each_run_has_its_price_many_rows_are_run_at_once(slow: type[Slow]) -> None:
    slow.run_s, slow.row_s = 0.001, 0.000_001
    assert tried("classify_float32", seconds=MINUTE_S).batch >= 64


def test_where_only_rows_have_a_price_few_rows_are_run_at_once(slow: type[Slow]) -> None:
    slow.row_s = 0.003
    assert tried("classify_float32").batch <= 8


@pytest.mark.parametrize(("gain", "threads"), [(1.0, 1), (50.0, 2)])
def test_more_threads_are_taken_only_where_they_are_clearly_faster(slow: type[Slow], gain: float, threads: int) -> None:
    slow.row_s, slow.gain = 0.001, gain
    assert tried("classify_float32", seconds=MINUTE_S).threads == threads


def test_sizes_that_change_a_bit_of_an_answer_are_left_out_and_named(slow: type[Slow]) -> None:
    slow.run_s, slow.unequal = 0.001, (16, 64, 128)
    result = tried("classify_float32", seconds=MINUTE_S)
    assert result.batch == 32
    assert result.inexact_batches == [16, 64, 128]


def test_a_shorter_last_batch_that_changes_an_answer_rules_its_size_out(slow: type[Slow]) -> None:
    slow.run_s, slow.unequal = 0.001, (autotune.SAMPLE_ROWS % 32,)
    result = tried("classify_float32", seconds=MINUTE_S)
    assert result.batch < 32
    assert {32, 64, 128} <= set(result.inexact_batches)


def test_a_model_that_mixes_rows_is_run_one_row_at_a_time() -> None:
    result = tried("mixes_rows", seconds=MINUTE_S)
    assert result.batch == 1
    assert set(result.inexact_batches) >= {4, 32}


def test_a_batch_that_would_take_more_memory_than_there_is_is_not_taken(
    slow: type[Slow], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.run_s = 0.001
    sizes = iter(range(0, 1 << 40, 1 << 20))
    monkeypatch.setattr(memory, "resident_bytes", lambda: next(sizes))
    assert tried("classify_float32", most_bytes=1 << 20, seconds=MINUTE_S).batch == 4


def test_a_model_too_slow_for_a_trial_is_run_by_single_rows(slow: type[Slow]) -> None:
    slow.row_s = 0.2
    assert tried("classify_float32", seconds=0.5).batch == 1
    assert slow.runs < 12


def test_a_size_that_cannot_be_run_ends_the_search_and_not_the_trial(slow: type[Slow]) -> None:
    run = slow._run_batch

    def refusing(self: Slow, part: Any) -> Any:
        if len(part) > 8:
            raise BadBundle("not so many")
        return run(self, part)

    slow.run_s = 0.001
    slow._run_batch = refusing  # type: ignore[method-assign]
    assert tried("classify_float32", seconds=MINUTE_S).batch == 8


def test_a_model_made_for_a_fixed_batch_keeps_it() -> None:
    assert tried("fixed_batch").batch == 1


def test_no_batch_is_larger_than_the_largest_that_is_tried() -> None:
    loaded = TfliteModel(model("classify_int8"), 10**6)
    assert loaded.batch == autotune.BATCH_SIZES[-1]


# --- in the probe, and remembered ---


def test_the_probe_tunes_in_its_child_process_on_request() -> None:
    report = probe.probe(around(model("classify_int8")), [])
    assert report.ok
    assert report.tuning is not None
    assert report.tuning.model == tuning.model_digest(model("classify_int8"))
    assert (report.tuning.runtime, report.tuning.machine) == (runtime_name(), tuning.describe_machine())
    assert probe.probe(around(model("classify_int8"))).tuning is None


def made(**changes: Any) -> Tuning:
    same: dict[str, Any] = {
        "model": tuning.model_digest(model("classify_int8")),
        "runtime": runtime_name(),
        "machine": tuning.describe_machine(),
    }
    return Tuning(**{**same, "batch": 3, "threads": 1, "rows_per_s": 1.5, **changes})


def test_what_was_chosen_before_is_not_tried_again() -> None:
    assert probe.probe(around(model("classify_int8")), [made(model="other"), made()]).tuning == made()


@pytest.mark.parametrize(
    "changes", [{"model": "sha256:0"}, {"runtime": "other 1.0"}, {"machine": "other"}, {"tensors": SUMS}]
)
def test_another_model_output_runtime_or_machine_is_tried_anew(changes: dict[str, str]) -> None:
    result = probe.probe(around(model("classify_int8")), [made(**changes)]).tuning
    assert result is not None
    assert result.batch != 3


def test_a_choice_names_the_output_it_was_made_for() -> None:
    content = model("each_label_and_sums")
    given = np.random.default_rng(1).normal(
        0, 1, (autotune.SAMPLE_ROWS, *TfliteModel(content, tensors=SUMS).input_shape)
    )
    result = autotune.tune(content, given.astype(np.float32), PLENTY, tensors=SUMS)
    assert result.tensors == SUMS
    assert tuning.find_known([result], content, runtime_name(), SUMS) == result
    assert tuning.find_known([result], content, runtime_name(), TensorSelection(outputs=("each",))) is None


def test_a_model_that_is_refused_is_not_tried() -> None:
    report = probe.probe(around(model("classify_int8"), Recipe("classify", "", labels=("a", "b"))), [])
    assert not report.ok
    assert report.tuning is None


@pytest.fixture
def child(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`child(script)`: the probe starts that in place of Python."""

    def replace(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\ncat >/dev/null\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr("outstation.ml.model.sandbox.probe.sys.executable", str(path))

    return replace


_PASSED = """echo '["x", [["load", true, "fine"]], 1]'"""


def test_a_model_that_crashes_in_the_trial_is_refused(child: Any) -> None:
    child(f"{_PASSED}; kill -SEGV $$")
    report = probe.probe(around(model("classify_int8"), CLASSIFY), [])
    assert [(name, ok) for name, ok, _ in report.checks] == [("load", True), ("autotune", False)]
    assert "SIGSEGV" in report.checks[1][2]


def test_autotuning_out_of_memory_refuses_no_model_that_passed(child: Any) -> None:
    child(f"{_PASSED}; kill -KILL $$")
    report = probe.probe(around(model("classify_int8"), CLASSIFY), [])
    assert (report.ok, report.tuning) == (True, None)


def test_a_tuning_is_described_in_words() -> None:
    assert str(made(batch=1, threads=2, rows_per_s=1234.4)) == "one row at a time on 2 threads, 1,234 rows/s"
    assert str(made(batch=32, threads=1)) == "batches of 32 on 1 thread, 2 rows/s"
