"""From a name in the config to a model that may run: find, verify, probe in a child, then load."""

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


class LoadedBundle(msgspec.Struct, frozen=True):
    """A bundle that proved itself here, loaded."""

    bundle: Bundle
    model: RunnableModel
    reference: Reference | None
    tuning: Tuning | None


class ProvenBundle(msgspec.Struct, frozen=True):
    """A verified bundle that passed its checks on this machine, and how its model is run best."""

    bundle: Bundle
    reference: Reference | None
    tuning: Tuning | None


def activate(
    path: Path,
    publishers: Sequence[PublicKey],
    known_tunings: Sequence[Tuning] = (),
    loading: Callable[[Bundle], AbstractContextManager[object]] = nullcontext,
) -> LoadedBundle:
    """Raises BadBundle with the reason; what ran before stays as it is.

    How it is run is taken from `known` choices or tried; the model is loaded here within `loading`.
    """
    found = bundle.read(path, [*publishers, *builtin.publisher_keys()])
    try:
        return load_bundle(probe_bundle(found, known_tunings), loading)
    except BadBundle as problem:
        raise BadBundle(f"{path}: {problem}") from None


def probe_bundle(verified: Bundle, known_tunings: Sequence[Tuning] = ()) -> ProvenBundle:
    """Run the checks of a verified bundle in a child process. Raises BadBundle with the one that failed.

    A bundle that passed them before is not checked anew where all is the same: its bytes, the runtime, the machine and
    the agent. A `known` choice says so.
    """
    passed = f"{verified.digest} {__version__}"
    choice = find_known(known_tunings, verified.model_bytes, runtime.RUNTIME_NAME, verified.manifest.output.tensor)
    if choice is None or choice.verified_for != passed:
        report = probe.probe(verified, known_tunings)
        report.raise_for_failure()
        choice = None if report.tuning is None else replace(report.tuning, verified_for=passed)
    return ProvenBundle(verified, read_reference(verified), choice)


def load_bundle(
    proven: ProvenBundle, loading: Callable[[Bundle], AbstractContextManager[object]] = nullcontext
) -> LoadedBundle:
    """Raises BadBundle."""
    found = proven.bundle
    with loading(found):
        model = inference.load_model(found.manifest, found.model_bytes, proven.tuning)
    return LoadedBundle(found, model, proven.reference, proven.tuning)


def read_reference(verified: Bundle) -> Reference | None:
    """The drift reference in a bundle. Raises BadBundle where it is damaged or made for another model."""
    if "reference.json" not in verified.files:
        return None
    made = Reference.from_json(verified.files["reference.json"])
    spec = verified.manifest
    fits = {
        "fields": made.fields == tuple(spec.input.fields),
        "labels": made.labels == tuple(spec.output.labels),
        "window rows": made.window_rows == (spec.input.window.rows if spec.input.window else 1),
    }
    wrong = [name for name, same in fits.items() if not same]
    if wrong:
        raise BadBundle(f"reference.json was made for other {', '.join(wrong)} than the manifest's; pack it again")
    return made
