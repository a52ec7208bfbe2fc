"""Activation: verify a bundle, probe it in a child process, then load it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec
from msgspec.structs import replace

from outstation import __version__
from outstation.foundation.errors import BadBundle
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.model.bundle import builtin
from outstation.ml.model.bundle import bundle as bundles
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference import scores
from outstation.ml.model.inference.inference import Inference, RunnableModel
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.ml.model.inference.tuning import Tuning, find_known
from outstation.ml.model.sandbox import launch
from outstation.ml.model.sandbox.confinement import ModelPolicy
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel
from outstation.protocol.wire.keys import PublicKey

# Blocks of files are large, and a person who waits for them can end the command.
_FILE_BLOCK_TIMEOUT_S = 3600.0


_processes: WeakValueDictionary[tuple[object, ...], SubprocessModel] = WeakValueDictionary()


class ProvenBundle(msgspec.Struct, frozen=True):
    """A verified bundle that passed its probe on this machine, and the tuning of its model."""

    bundle: Bundle
    reference: Reference | None
    tuning: Tuning | None


class LoadedBundle(ProvenBundle, frozen=True):
    model: RunnableModel


def activate(
    path: Path,
    publishers: Sequence[PublicKey],
    known_tunings: Sequence[Tuning] = (),
    loading: Callable[[Bundle], AbstractContextManager[object]] = nullcontext,
    policy: ModelPolicy | None = None,
    on_wait: Callable[[], None] = lambda: None,
) -> LoadedBundle:
    """Verify and probe the bundle at `path`, and start its model as `load_bundle` does. Raises BadBundle."""
    verified = bundles.read(path, [*publishers, *builtin.publisher_keys()])
    try:
        return load_bundle(probe_bundle(verified, known_tunings, policy), loading, policy, on_wait)
    except BadBundle as problem:
        raise BadBundle(f"{path}: {problem}") from None


def probe_bundle(
    verified: Bundle, known_tunings: Sequence[Tuning] = (), policy: ModelPolicy | None = None
) -> ProvenBundle:
    """Probe a verified bundle in a child process. Raises BadBundle with the check that failed.

    The probe is skipped if a known tuning says that the bundle passed before with the same bytes, runtime, machine and
    agent.
    """
    passed = f"{verified.digest} {__version__}"
    tuning = find_known(known_tunings, verified.model_bytes, runtime_name(), verified.manifest.tensors)
    if tuning is None or tuning.verified_for != passed:
        from outstation.ml.model.sandbox import probe

        report = probe.probe(verified, known_tunings, policy)
        report.raise_for_failure()
        tuning = None if report.tuning is None else replace(report.tuning, verified_for=passed)
    return ProvenBundle(verified, read_reference(verified), tuning)


def load_bundle(
    proven: ProvenBundle,
    loading: Callable[[Bundle], AbstractContextManager[object]] = nullcontext,
    policy: ModelPolicy | None = None,
    on_wait: Callable[[], None] = lambda: None,
) -> LoadedBundle:
    """Start the model in a confined process, or load it into this one if `policy` turns confinement off.

    This process loads inside the context `loading`. `on_wait` is called about once a second while a model process
    works. Raises BadBundle.
    """
    bundle, tuning, policy = proven.bundle, proven.tuning, policy or ModelPolicy()
    policy.check()
    model: RunnableModel
    if policy.confinement == "off":
        from outstation.ml.model.inference import runtime

        with loading(bundle):
            model = runtime.load_model(bundle.manifest, bundle.model_bytes, tuning)
    else:
        model = _share_process(bundle, tuning, policy, on_wait)
    return LoadedBundle(bundle, proven.reference, tuning, model)


def _share_process(
    bundle: Bundle, tuning: Tuning | None, policy: ModelPolicy, on_wait: Callable[[], None]
) -> SubprocessModel:
    """Return the model process of this bundle, or start it: tasks of one bundle take 20 MB once.

    A process ends with the thread that started it, and its memory limit is the policy's.
    """
    settings = (tuning.batch, tuning.threads) if tuning else None
    key = bundle.digest, settings, policy, threading.get_ident()
    model = _processes.get(key)
    if model is None:
        model = _processes[key] = SubprocessModel(bundle, tuning, policy, on_wait)
    return model


def open_for_files(bundle: Bundle, view: Bundle | None = None) -> Inference:
    """Probe a bundle, and start its model in a confined process for the blocks of files. Raises BadBundle.

    `view` is the bundle as it is run, where that is one of its further outputs alone.
    """
    shown = view or bundle
    from outstation.ml.model.sandbox import probe

    # It imports the runtime while the probe runs.
    launch.prepare_spare()
    try:
        probe.probe(bundle).raise_for_failure()
        model = SubprocessModel(shown, call_timeout_s=_FILE_BLOCK_TIMEOUT_S)
        model.wait_loaded()
    finally:
        launch.discard_spare()
    return Inference(shown.manifest, model)


def read_reference(verified: Bundle) -> Reference | None:
    """Return the drift reference of a bundle. Raises BadBundle if it is damaged or made for another model."""
    if "reference.json" not in verified.files:
        return None
    reference = Reference.from_json(verified.files["reference.json"])
    spec = verified.manifest
    matches = {
        "fields": reference.fields == tuple(spec.input.fields),
        "labels": reference.labels == tuple(spec.output.labels),
        "outputs": not reference.further
        or tuple(known.output for known in reference.further) == scores.monitored_outputs(spec),
        "window rows": reference.window_rows == spec.input.rows,
    }
    wrong = [name for name, is_equal in matches.items() if not is_equal]
    if wrong:
        raise BadBundle(f"reference.json was made for other {', '.join(wrong)} than the manifest's; pack it again")
    return reference
