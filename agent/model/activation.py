"""Activation: verify a bundle, probe it in a child process, then load it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import msgspec
from msgspec.structs import replace

from agent import __version__
from agent.drift.baseline.reference import Reference
from agent.errors import BadBundle
from agent.model.bundle import builtin, bundle
from agent.model.bundle.bundle import Bundle
from agent.model.inference import inference, runtime
from agent.model.inference.inference import RunnableModel
from agent.model.inference.tuning import Tuning, find_known
from agent.model.sandbox import probe
from agent.wire.keys import PublicKey


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
) -> LoadedBundle:
    """Verify, probe and load the bundle at `path`, inside the context `loading`. Raises BadBundle."""
    verified = bundle.read(path, [*publishers, *builtin.publisher_keys()])
    try:
        return load_bundle(probe_bundle(verified, known_tunings), loading)
    except BadBundle as problem:
        raise BadBundle(f"{path}: {problem}") from None


def probe_bundle(verified: Bundle, known_tunings: Sequence[Tuning] = ()) -> ProvenBundle:
    """Probe a verified bundle in a child process. Raises BadBundle with the check that failed.

    The probe is skipped if a known tuning says that the bundle passed before with the same bytes, runtime, machine and
    agent.
    """
    passed = f"{verified.digest} {__version__}"
    tuning = find_known(known_tunings, verified.model_bytes, runtime.RUNTIME_NAME, verified.manifest.output.tensor)
    if tuning is None or tuning.verified_for != passed:
        report = probe.probe(verified, known_tunings)
        report.raise_for_failure()
        tuning = None if report.tuning is None else replace(report.tuning, verified_for=passed)
    return ProvenBundle(verified, read_reference(verified), tuning)


def load_bundle(
    proven: ProvenBundle, loading: Callable[[Bundle], AbstractContextManager[object]] = nullcontext
) -> LoadedBundle:
    """Load the model into this process. Raises BadBundle."""
    with loading(proven.bundle):
        model = inference.load_model(proven.bundle.manifest, proven.bundle.model_bytes, proven.tuning)
    return LoadedBundle(proven.bundle, proven.reference, proven.tuning, model)


def read_reference(verified: Bundle) -> Reference | None:
    """Return the drift reference of a bundle. Raises BadBundle if it is damaged or made for another model."""
    if "reference.json" not in verified.files:
        return None
    reference = Reference.from_json(verified.files["reference.json"])
    spec = verified.manifest
    matches = {
        "fields": reference.fields == tuple(spec.input.fields),
        "labels": reference.labels == tuple(spec.output.labels),
        "window rows": reference.window_rows == spec.input.rows,
    }
    wrong = [name for name, is_equal in matches.items() if not is_equal]
    if wrong:
        raise BadBundle(f"reference.json was made for other {', '.join(wrong)} than the manifest's; pack it again")
    return reference
