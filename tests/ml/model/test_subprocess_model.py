"""A model in a process of its own: the answers it would give here, and no harm where it crashes, hangs or eats."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from outstation.foundation.errors import BadBundle, ModelProcessFailed
from outstation.ml.model.bundle import bundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference import inference, runtime
from outstation.ml.model.sandbox import launch
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel
from outstation.workbench.testing.patience import wait_until
from scripts.kit.bundles import CLASSIFY, around, model, readings
from tests.kit.marks import crashing

pytestmark = pytest.mark.exec

SHIPPED = Path(__file__).parents[3] / "models" / "exercise"
CALM = np.clip(readings(40), -3, 3)
WILD = np.where(np.arange(160).reshape(40, 4) == 77, np.float32(3.9), CALM)


def tiny(name: str = "classify_int8", memory_mib: int = 512) -> Bundle:
    return around(model(name), CLASSIFY, memory_mib=memory_mib)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture(scope="module")
def classifier() -> Iterator[SubprocessModel]:
    with SubprocessModel(tiny()) as item:
        yield item


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(np.float32, st.tuples(st.integers(0, 300), st.just(4)), elements=st.floats(width=32)))
def test_answers_are_those_of_the_same_model_in_this_process_to_the_bit(
    classifier: SubprocessModel, rows: np.ndarray
) -> None:
    here = runtime.TfliteModel(model("classify_int8"))
    assert np.array_equal(classifier.invoke(rows), here.invoke(rows))


@pytest.mark.parametrize("name", ["classify_float32", "fixed_batch", "sums_int16", "each_label"])
def test_so_are_those_of_other_types_and_of_fixed_batches(name: str) -> None:
    here = runtime.TfliteModel(model(name))
    with SubprocessModel(tiny(name)) as there:
        for count in (1, 0, 33, 5000, 2):
            rows = readings(count, seed=count)
            assert np.array_equal(there.invoke(rows), here.invoke(rows))
        assert (there.outputs, there.input_range) == (here.outputs, here.input_range)


def test_windows_of_another_size_are_refused_and_the_process_goes_on(classifier: SubprocessModel) -> None:
    pid = classifier.pid
    with pytest.raises(BadBundle, match=r"takes \[4\] values, got \[3\]"):
        classifier.invoke(np.zeros((2, 3), np.float32))
    assert classifier.invoke(CALM).shape == (40, 3)
    assert classifier.pid == pid


@crashing
def test_a_crash_is_recognized_and_the_next_batch_gets_a_new_process() -> None:
    with SubprocessModel(tiny("rigged_crash")) as there:
        before = there.invoke(CALM)
        with pytest.raises(
            ModelProcessFailed, match=r"the model crashed: the runtime crashed on it \(SIGFPE\)"
        ) as died:
            there.invoke(WILD)
        assert died.value.kind == "crash"
        assert not there.is_running
        assert np.array_equal(there.invoke(CALM), before)


def test_a_hang_is_ended_in_time_while_the_caller_is_called_back() -> None:
    ticks: list[float] = []
    with SubprocessModel(
        tiny("rigged_hang"), on_wait=lambda: ticks.append(time.monotonic()), call_timeout_s=2.5
    ) as there:
        there.invoke(CALM)
        pid, began = there.pid, time.monotonic()
        with pytest.raises(
            ModelProcessFailed, match=r"the model hangs: did not answer within 2.5 s and was killed"
        ) as died:
            there.invoke(WILD)
        assert died.value.kind == "hang"
        assert 2.4 < time.monotonic() - began < 30
        assert len([at for at in ticks if at > began]) >= 2
        assert pid is not None
        assert has_ended(pid)
        assert there.invoke(CALM).shape == (40, 3)


def test_an_error_of_the_runtime_is_reported_and_the_process_stays() -> None:
    with SubprocessModel(tiny("rigged_error")) as there:
        there.invoke(CALM)
        pid = there.pid
        with pytest.raises(ModelProcessFailed, match=r"the model failed: .*gather index out of bounds") as died:
            there.invoke(WILD)
        assert died.value.kind == "error"
        assert there.invoke(CALM).shape == (40, 3)
        assert there.pid == pid


def test_a_model_that_wants_a_gigabyte_gets_only_what_its_manifest_says() -> None:
    with SubprocessModel(tiny("greedy", memory_mib=128)) as there, pytest.raises(ModelProcessFailed):
        there.invoke(CALM[:1])


def test_a_model_that_cannot_be_loaded_says_why_at_its_first_use() -> None:
    with (
        SubprocessModel(tiny("two_inputs")) as there,
        pytest.raises(ModelProcessFailed, match="the model has 2 inputs") as died,
    ):
        there.invoke(CALM)
    assert died.value.kind == "error"


def test_a_killed_process_is_a_crash_and_its_successor_answers() -> None:
    with SubprocessModel(tiny()) as there:
        expected = there.invoke(CALM)
        assert there.pid is not None
        os.kill(there.pid, signal.SIGKILL)
        wait_until("the process is gone", lambda: not there.is_running)
        assert np.array_equal(there.invoke(CALM), expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_stops_the_agent_is_no_crash_of_the_model(number: signal.Signals) -> None:
    with SubprocessModel(tiny()) as there:
        assert there.pid is not None
        os.kill(there.pid, number)
        there.invoke(CALM)
        os.kill(there.pid, number)
        assert there.invoke(CALM).shape == (40, 3)


PARENT = """
import sys, time, numpy as np
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel
from scripts.kit.bundles import CLASSIFY, around, model
rows = np.full((1, 4), 3.9, np.float32)
there = SubprocessModel(around(model("rigged_hang"), CLASSIFY))
there.outputs
print(there.pid, flush=True)
there.invoke(rows)
"""


def test_a_process_that_hangs_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not has_ended(pid)
        parent.kill()
    wait_until("the child went with its parent", lambda: has_ended(pid))


NOISY = "import os, sys; [os.write(2, b'x' * 65536) for _ in range(200)]; sys.exit(3)"


def test_only_the_end_of_a_long_stderr_is_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "noisy_child.py").write_text(NOISY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "WORKER_MODULE", "noisy_child")
    with (
        SubprocessModel(tiny()) as there,
        pytest.raises(ModelProcessFailed, match=r"the child process failed \(3\): x{300}"),
    ):
        there.invoke(CALM)


@pytest.mark.parametrize("body", [b"abc", b"\x81\xa7kernels\xa1\xff"])
def test_what_answers_something_else_is_taken_for_a_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: bytes
) -> None:
    message = bytes([0, len(body), 0, 0, 0]) + body
    (tmp_path / "strange_child.py").write_text(f"import os, time; os.write(1, {message!r}); time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "WORKER_MODULE", "strange_child")
    with SubprocessModel(tiny()) as there:
        pid = there.pid
        with pytest.raises(ModelProcessFailed, match="sent an invalid start message"):
            there.invoke(CALM)
    assert pid is not None
    assert has_ended(pid)


def test_an_inference_takes_it_for_a_model_and_counts_the_time_in_it() -> None:
    shipped = bundle.read(SHIPPED, None)
    rows = np.load(SHIPPED.parent / "recordings" / "exercise.npz")["rows"][:2000]
    t = np.arange(len(rows)) * 20_000
    here = inference.Inference(shipped.manifest, runtime.load_model(shipped.manifest, shipped.model_bytes)).run(
        rows, t, with_outputs=True
    )
    with SubprocessModel(shipped) as subprocess_model:
        there = inference.Inference(shipped.manifest, subprocess_model).run(rows, t, with_outputs=True)
    assert there.outputs is not None
    assert here.outputs is not None
    assert np.array_equal(there.outputs, here.outputs)
    assert 0 < there.seconds < 60
    assert 0 < here.seconds < 60


def test_the_caller_does_not_wait_for_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "silent_child.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "WORKER_MODULE", "silent_child")
    with SubprocessModel(tiny()) as there:
        assert there.is_running
        assert not there.poll_ready()


def test_a_caller_that_does_not_wait_polls_later() -> None:
    with SubprocessModel(tiny()) as there:
        wait_until("it has started", there.poll_ready)
        request = there.submit(CALM)
        answers: list[np.ndarray | None] = []

        def answered() -> bool:
            answers.append(there.poll(request))
            return answers[-1] is not None

        wait_until("it has answered", answered)
        assert answers[-1] is not None
        assert np.array_equal(answers[-1], runtime.TfliteModel(model("classify_int8")).invoke(CALM))
        assert there.poll_ready()


def test_an_unanswered_request_fails_at_its_timeout() -> None:
    with SubprocessModel(tiny("rigged_hang"), call_timeout_s=0.5) as there:
        wait_until("it has started", there.poll_ready)
        request = there.submit(WILD)
        assert there.poll(request) is None
        with pytest.raises(ModelProcessFailed, match=r"did not answer within 0\.5 s"):
            wait_until("it is ended", lambda: there.poll(request, 0.05) is not None)
        assert not there.is_running


def test_a_process_that_was_slowed_while_its_caller_committed_is_not_ended_for_the_callers_absence() -> None:
    with SubprocessModel(tiny(), call_timeout_s=0.5) as there:
        before, pid = there.invoke(CALM), there.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        run = there.start_run(there.input.quantize(CALM))
        # A commit that takes longer than the timeout, on a disk that the process waits for, too.
        time.sleep(2.5)
        os.kill(pid, signal.SIGCONT)
        assert np.array_equal(there.output.dequantize(there.wait(run)), before)
        assert there.pid == pid


def test_a_process_that_hangs_while_its_caller_commits_is_ended_soon_after() -> None:
    with SubprocessModel(tiny("rigged_hang"), call_timeout_s=0.5) as there:
        run = there.start_run(there.input.quantize(WILD))
        time.sleep(2.5)
        began = time.monotonic()
        with pytest.raises(ModelProcessFailed, match=r"did not answer within 0\.5 s"):
            there.wait(run)
        assert time.monotonic() - began < 30
        assert not there.is_running


def test_callers_that_share_a_process_get_their_own_answers() -> None:
    here = runtime.TfliteModel(model("classify_int8"))
    with SubprocessModel(tiny()) as there:
        first = there.submit(CALM[:7])
        assert np.array_equal(there.invoke(CALM), here.invoke(CALM))
        second = there.submit(CALM[7:14])
        there.poll(second, 30.0)
        assert np.array_equal(first.take_outputs(), here.invoke(CALM[:7]))
        assert np.array_equal(second.take_outputs(), here.invoke(CALM[7:14]))


def test_a_crash_on_one_callers_request_does_not_fail_the_next_callers() -> None:
    with SubprocessModel(tiny("rigged_crash")) as there:
        request = there.submit(WILD)
        assert there.invoke(CALM).shape == (40, 3)
        with pytest.raises(ModelProcessFailed, match="the model crashed"):
            there.poll(request)


def test_a_shared_buffer_that_could_not_grow_stays_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError("refused")

    with contextlib.closing(launch.SharedBuffer()) as buffer:
        with monkeypatch.context() as refused:
            refused.setattr("outstation.ml.model.sandbox.launch.mmap.mmap", refuse)
            with pytest.raises(OSError, match="refused"):
                buffer.grow(1 << 20)
        buffer.map[0] = 7
        buffer.grow(1 << 20)
        assert (buffer.map[0], len(buffer.map), buffer.size) == (7, 1 << 20, 1 << 20)
