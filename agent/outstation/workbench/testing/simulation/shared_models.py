"""Shared models: the model host of all simulated devices. Each bundle is probed and loaded once.

Active models run in this process. A candidate of a roll-out runs in a confined process, because it may crash or hang;
the simulation waits for its answers, which makes a run repeatable. No inference time is measured: it would be this
machine's. A candidate hangs once it has computed for as long as a device waits, so a stall of the machine is no hang.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.device.bootstrap.model_host import Loading, ModelHost
from outstation.foundation.arrays import Float32s
from outstation.ml.model import activation
from outstation.ml.model.activation import LoadedBundle, ProvenBundle
from outstation.ml.model.bundle import builtin
from outstation.ml.model.bundle import bundle as bundles
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference.info_lines import hide_info_lines
from outstation.ml.model.inference.runtime import FinishedRun
from outstation.ml.model.inference.tuning import Tuning, describe_machine, model_digest
from outstation.ml.model.sandbox import probe
from outstation.ml.model.sandbox.confinement import ModelPolicy
from outstation.ml.model.sandbox.probe import ProbeReport
from outstation.ml.model.sandbox.subprocess_model import ModelRequest, SubprocessModel
from outstation.protocol.wire.keys import PublicKey

# The model is the user's own, and a process for each of a thousand devices would be too many.
_IN_PROCESS = ModelPolicy("off")
# Instead of a measured speed, on which the size of batches depends.
_ROWS_PER_S = 10_000.0
# A process that neither computes nor answers is killed this long after its deadline.
_STALL_S = 600.0
_LOOK_S = 1.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class SharedModels(ModelHost):
    """Models of a simulation; `close` ends the processes of candidates."""

    def __init__(self) -> None:
        self._reports: dict[str, ProbeReport] = {}
        self._loaded: dict[str, LoadedBundle] = {}
        self._candidates: dict[tuple[str, float], CandidateModel] = {}

    def close(self) -> None:
        for model in self._candidates.values():
            model.close()
        self._candidates.clear()

    def activate(
        self,
        path: Path,
        publishers: Sequence[PublicKey],
        known_tunings: Sequence[Tuning] = (),
        loading: Loading = nullcontext,
        policy: ModelPolicy | None = None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> LoadedBundle:
        verified = bundles.read(path, [*publishers, *builtin.publisher_keys()])
        report = self.probe(verified, known_tunings, _IN_PROCESS)
        report.raise_for_failure()
        proven = ProvenBundle(verified, activation.read_reference(verified), report.tuning)
        return self.load(proven, loading, _IN_PROCESS, on_wait)

    def probe(self, bundle: Bundle, known_tunings: Sequence[Tuning], policy: ModelPolicy) -> ProbeReport:
        """Probe a bundle once, with the same batches on any machine, however busy it is."""
        if bundle.digest not in self._reports:
            report = probe.probe(bundle, None, policy, grace_s=_STALL_S)
            tensors = bundle.manifest.tensors
            names = (model_digest(bundle.model_bytes), report.runtime, describe_machine())
            tuning = Tuning(*names, batch=1, threads=1, rows_per_s=_ROWS_PER_S, tensors=tensors)
            self._reports[bundle.digest] = replace(report, tuning=tuning)
        return self._reports[bundle.digest]

    def load(
        self, proven: ProvenBundle, loading: Loading, policy: ModelPolicy, on_wait: Callable[[], None]
    ) -> LoadedBundle:
        digest = proven.bundle.digest
        if digest not in self._loaded:
            with hide_info_lines():
                self._loaded[digest] = activation.load_bundle(proven, policy=_IN_PROCESS)
        return self._loaded[digest]

    def start_candidate(
        self, proven: ProvenBundle, policy: ModelPolicy, on_wait: Callable[[], None], timeout_s: float
    ) -> CandidateModel:
        key = (proven.bundle.digest, timeout_s)
        if key not in self._candidates:
            # The confinement of models that this machine gives, whatever the devices' config says.
            model = PatientModel(proven.bundle, proven.tuning, ModelPolicy(), call_timeout_s=timeout_s)
            self._candidates[key] = CandidateModel(model)
        return self._candidates[key]

    def start_job(self, job: Callable[[], None]) -> None:
        """Run a job at once: in simulated time it takes none."""
        job()


class PatientModel(SubprocessModel):
    """Model whose timeouts are processor time of its process."""

    _sent_s = 0.0

    def _send(self, windows: NDArray[Any]) -> ModelRequest:
        self._sent_s = self._read_processor_s()
        return super()._send(windows)

    def _collect_or_wait(self, request: ModelRequest) -> None:
        # Not at once, as at the deadline: that may be long past.
        self._collect(_LOOK_S)

    def _check_timeout(self, deadline_s: float, timeout_s: float) -> None:
        # A process that starts has no request.
        begin_s = 0.0 if self._pending is None else self._sent_s
        has_hung = self._read_processor_s() - begin_s >= timeout_s
        super()._check_timeout(deadline_s if has_hung else deadline_s + _STALL_S, timeout_s)

    def _read_processor_s(self) -> float:
        """Return the processor time of the process, of user and system; 0 if it has ended."""
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return 0.0
        # The name of the program, in parentheses, may have spaces.
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


class CandidateModel:
    """Model in a process, used like one in this process: the caller waits, and no simulated time passes."""

    seconds = 0.0
    is_concurrent = False
    outputs = property(attrgetter("_model.outputs"))
    kernels = property(attrgetter("_model.kernels"))
    input_shape = property(attrgetter("_model.input_shape"))
    input = property(attrgetter("_model.input"))
    output = property(attrgetter("_model.output"))
    input_range = property(attrgetter("_model.input_range"))
    output_range = property(attrgetter("_model.output_range"))

    def __init__(self, model: SubprocessModel) -> None:
        self._model = model

    def allocate(self, count: int) -> NDArray[Any]:
        return self._model.allocate(count)

    def start_run(self, windows: NDArray[Any]) -> FinishedRun:
        return FinishedRun(self._model.wait(self._model.start_run(windows)), 0.0)

    def wait(self, run: FinishedRun) -> NDArray[Any]:
        return run.numbers

    def invoke(self, windows: Float32s) -> Float32s:
        return self._model.invoke(windows)

    def close(self) -> None:
        self._model.close()
