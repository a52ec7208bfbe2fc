"""Candidates of a simulated roll-out: a machine that stalls changes nothing, and a model that hangs is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from outstation.foundation.errors import ModelProcessFailed
from outstation.ml.model import activation
from outstation.ml.model.sandbox import launch
from outstation.ml.model.sandbox.confinement import ModelPolicy
from outstation.workbench.testing.simulation.shared_models import CandidateModel, PatientModel, SharedModels
from scripts.kit.bundles import CLASSIFY, around, model, readings

pytestmark = pytest.mark.process

CALM = np.clip(readings(40), -3, 3)
WILD = np.where(np.arange(160).reshape(40, 4) == 77, np.float32(3.9), CALM)


def test_a_candidate_that_the_machine_stops_beyond_its_timeout_answers() -> None:
    process = PatientModel(around(model("classify_int8"), CLASSIFY), None, ModelPolicy(), call_timeout_s=0.2)
    with process:
        candidate = CandidateModel(process)
        before, pid = candidate.invoke(CALM), process.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        resume = threading.Timer(1.2, os.kill, (pid, signal.SIGCONT))
        resume.start()
        assert np.array_equal(candidate.invoke(CALM), before)
        resume.join()
        assert process.pid == pid


def test_a_candidate_that_computes_beyond_its_timeout_is_ended_and_the_next_one_as_well() -> None:
    process = PatientModel(around(model("rigged_hang"), CLASSIFY), None, ModelPolicy(), call_timeout_s=0.3)
    with process:
        for _ in range(2):
            began_s = time.monotonic()
            with pytest.raises(ModelProcessFailed, match=r"did not answer within 0\.3 s"):
                CandidateModel(process).invoke(WILD)
            assert time.monotonic() - began_s < 60
            assert not process.is_running


def test_a_machine_that_is_busy_for_minutes_rejects_no_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    run, busy_s = launch.run_module, 240.0

    def run_late(module: str, request: bytes, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        if timeout_s < busy_s:
            raise subprocess.TimeoutExpired(module, timeout_s)
        return run(module, request, timeout_s)

    monkeypatch.setattr(launch, "run_module", run_late)
    report = SharedModels().probe(around(model("classify_int8"), CLASSIFY), (), ModelPolicy("off"))
    report.raise_for_failure()
    assert report.tuning is not None
    assert report.tuning.batch == 1


def test_a_loaded_model_writes_no_lines_of_its_runtime_but_warnings(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        os.write(2, b"INFO: Created delegate\nWARNING: no memory\n")

    monkeypatch.setattr(activation, "load_bundle", load)
    proven: Any = SimpleNamespace(bundle=SimpleNamespace(digest="sha256:1"))
    SharedModels().load(proven, nullcontext, ModelPolicy("off"), lambda: None)
    assert capfd.readouterr().err == "WARNING: no memory\n"
