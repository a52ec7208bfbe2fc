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
from agent.model.inference.inference import Runs
from agent.model.inference.tuning import Choice, remembered
from agent.model.sandbox import probe
from agent.wire.keys import PublicKey


class Active(msgspec.Struct, frozen=True):
    """A bundle that proved itself here, loaded."""

    bundle: Bundle
    model: Runs
    reference: Reference | None
    choice: Choice | None


class Proved(msgspec.Struct, frozen=True):
    """A verified bundle that passed its checks on this machine, and how its model is run best."""

    bundle: Bundle
    reference: Reference | None
    choice: Choice | None


def activate(
    path: Path,
    publishers: Sequence[PublicKey],
    known: Sequence[Choice] = (),
    loading: Callable[[Bundle], AbstractContextManager[object]] = nullcontext,
) -> Active:
    """Raises BadBundle with the reason; what ran before stays as it is.

    How it is run is taken from `known` choices or tried; the model is loaded here within `loading`.
    """
    found = bundle.read(path, [*publishers, *builtin.publishers()])
    try:
        return load(prove(found, known), loading)
    except BadBundle as problem:
        raise BadBundle(f"{path}: {problem}") from None


def prove(found: Bundle, known: Sequence[Choice] = ()) -> Proved:
    """Run the checks of a verified bundle in a child process. Raises BadBundle with the one that failed.

    A bundle that passed them before is not checked anew where all is the same: its bytes, the runtime, the machine and
    the agent. A `known` choice says so.
    """
    passed = f"{found.digest} {__version__}"
    choice = remembered(known, found.model, runtime.NAME, found.manifest.output.tensor)
    if choice is None or choice.proved != passed:
        report = probe.probe(found, known)
        report.require()
        choice = None if report.choice is None else replace(report.choice, proved=passed)
    return Proved(found, reference(found), choice)


def load(proved: Proved, loading: Callable[[Bundle], AbstractContextManager[object]] = nullcontext) -> Active:
    """Raises BadBundle."""
    found = proved.bundle
    with loading(found):
        model = inference.load(found.manifest, found.model, proved.choice)
    return Active(found, model, proved.reference, proved.choice)


def reference(found: Bundle) -> Reference | None:
    """The drift reference in a bundle. Raises BadBundle where it is damaged or made for another model."""
    if "reference.json" not in found.files:
        return None
    made = Reference.from_json(found.files["reference.json"])
    spec = found.manifest
    fits = {
        "fields": made.fields == tuple(spec.input.fields),
        "labels": made.labels == tuple(spec.output.labels),
        "window rows": made.window_rows == (spec.input.window.rows if spec.input.window else 1),
    }
    wrong = [name for name, same in fits.items() if not same]
    if wrong:
        raise BadBundle(f"reference.json was made for other {', '.join(wrong)} than the manifest's; pack it again")
    return made
