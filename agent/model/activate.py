"""From a name in the config to a model that may run: find, verify, probe in a child, then load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.drift.reference import Reference
from agent.errors import BadBundle
from agent.model import bundle, probe, runtime, shipped
from agent.model.bundle import Bundle
from agent.wire.keys import PublicKey


@dataclass(frozen=True, slots=True)
class Active:
    """A bundle that proved itself here, loaded."""

    bundle: Bundle
    model: runtime.Model
    reference: Reference | None


def locate(name: str, store: Path) -> Path:
    """The folder or archive of a bundle: a path, one in `<data_dir>/bundles/`, or one that ships with the agent.

    Raises BadBundle.
    """
    if "/" in name:
        return Path(name)
    for candidate in (store / name, store / f"{name}.zip", shipped.bundles() / name):
        if candidate.exists():
            return candidate
    raise BadBundle(f"no bundle {name!r} in {store} nor among those shipped; put it there, or give its path")


def activate(path: Path, publishers: Sequence[PublicKey]) -> Active:
    """Raises BadBundle with the reason; what ran before stays as it is."""
    found = bundle.read(path, [*publishers, *shipped.publishers()])
    report = probe.probe(found)
    for name, ok, detail in report.checks:
        if not ok:
            raise BadBundle(f"{path}: {name}: {detail}")
    reference = Reference.from_json(found.files["reference.json"]) if "reference.json" in found.files else None
    return Active(found, runtime.Model(found.model), reference)
