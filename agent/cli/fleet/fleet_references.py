"""The drift references that are known beside the collector's database: of bundles, by their digest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from agent.drift.baseline.reference import Reference
from agent.errors import BadBundle
from agent.model.bundle import builtin, bundle
from agent.model.bundle.bundle import Bundle


def load_known(bundle_paths: Iterable[Path]) -> dict[str, tuple[Bundle, Reference]]:
    """Of these bundles and of those that ship with the agent. Raises BadBundle."""
    found = {}
    ours = [path for path in sorted(builtin.bundles_dir().iterdir()) if (path / "manifest.json").exists()]
    for path in [*ours, *bundle_paths]:
        one = bundle.read(path, None)
        if "reference.json" not in one.files:
            raise BadBundle(f"{path}: carries no drift reference")
        reference = Reference.from_json(one.files["reference.json"])
        found[reference.digest] = (one, reference)
    return found
