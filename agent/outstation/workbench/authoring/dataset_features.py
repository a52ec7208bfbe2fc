"""Check that data from an exported retraining set have the features of the SPEC that they are used for."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from outstation.foundation import decoders
from outstation.foundation.errors import ConfigError
from outstation.ml.model.bundle.feature_set import FeatureReference
from outstation.workbench.authoring.calibration import PackJob


class _DatasetHead(msgspec.Struct, frozen=True):
    """Manifest of a set, as far as it is read here."""

    format: str
    features: FeatureReference | None = None


def check(job: PackJob) -> None:
    """Raise ConfigError if a file of the SPEC was exported with another edition of its feature set."""
    pinned = job.draft.input.features
    if pinned is None:
        return
    for key, name in _list_data(job):
        exported = _read_features(job, name)
        if exported is not None and exported.name == pinned.name and exported.digest != pinned.digest:
            raise ConfigError(
                str(job.file),
                key,
                f"{job.path(name)} was exported with features {exported}, this SPEC has {pinned}; export the set again "
                "with `fleet dataset export --features`, or name the feature file that it was exported with",
            )


def _list_data(job: PackJob) -> Iterator[tuple[str, str]]:
    """Yield (key, file) of the SPEC's data."""
    spec = job.spec
    named = {
        "reference": spec.reference,
        "golden": spec.golden,
        "output.held_out": spec.output.held_out,
        "output.calibration_data": spec.output.calibration_data,
    }
    yield from ((key, name) for key, name in named.items() if name is not None)


def _read_features(job: PackJob, name: str) -> FeatureReference | None:
    """Return the feature set that the file was exported with; None for other files."""
    try:
        content = (job.path(name).parent / "manifest.json").read_bytes()
        head = decoders.from_json(content, _DatasetHead)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return head.features if head.format.startswith("outstation-dataset-") else None
