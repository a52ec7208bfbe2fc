"""Model host: how a device probes bundles and runs their models. A simulation has its own, for all of its devices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from outstation.ml.model import activation
from outstation.ml.model.activation import LoadedBundle, ProvenBundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference.inference import RunnableModel
from outstation.ml.model.inference.tuning import Tuning
from outstation.ml.model.sandbox import probe
from outstation.ml.model.sandbox.confinement import ModelPolicy
from outstation.ml.model.sandbox.probe import ProbeReport
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel
from outstation.protocol.wire.keys import PublicKey

Loading = Callable[[Bundle], AbstractContextManager[object]]


class ModelHost:
    """Host of one device: probes run in child processes, candidates in a process of their own, jobs on threads."""

    def activate(
        self,
        path: Path,
        publishers: Sequence[PublicKey],
        known_tunings: Sequence[Tuning] = (),
        loading: Loading = nullcontext,
        policy: ModelPolicy | None = None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> LoadedBundle:
        """Verify, probe and load the bundle at `path`, as `activation.activate` does. Raises BadBundle."""
        return activation.activate(path, publishers, known_tunings, loading, policy, on_wait)

    def probe(self, bundle: Bundle, known_tunings: Sequence[Tuning], policy: ModelPolicy) -> ProbeReport:
        """Probe a verified bundle, and tune its model."""
        return probe.probe(bundle, known_tunings, policy)

    def load(
        self, proven: ProvenBundle, loading: Loading, policy: ModelPolicy, on_wait: Callable[[], None]
    ) -> LoadedBundle:
        """Start the model of an active bundle. Raises BadBundle."""
        return activation.load_bundle(proven, loading, policy, on_wait)

    def start_candidate(
        self, proven: ProvenBundle, policy: ModelPolicy, on_wait: Callable[[], None], timeout_s: float
    ) -> RunnableModel:
        """Start the model of a candidate, which is never loaded into the daemon. Raises ModelProcessFailed."""
        return SubprocessModel(proven.bundle, proven.tuning, policy, on_wait, timeout_s)

    def start_job(self, job: Callable[[], None]) -> None:
        """Start a job of seconds that the main loop does not wait for."""
        threading.Thread(target=job, name="proving", daemon=True).start()
