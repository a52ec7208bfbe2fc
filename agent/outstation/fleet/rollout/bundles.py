"""Bundle resolution: the version and digest of a plan, from its file, a bundle on disk and the fleet's repository.

Repository metadata is only read. Devices verify who signed it, against their own trusted root.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from outstation.fleet.rollout.plan import PlanFile, RolloutPlan
from outstation.foundation import input_files
from outstation.foundation.errors import BadBundle
from outstation.protocol.wire import target_metadata
from outstation.protocol.wire.target_metadata import TargetMetadata

if TYPE_CHECKING:
    from outstation.ml.model.bundle.bundle import Bundle

MAX_METADATA_BYTES = 16 << 20


def read_bundle(plan_file: PlanFile) -> Bundle | None:
    """Return the bundle that a plan names by its path. Raises BadBundle."""
    from outstation.ml.model.bundle import bundle as bundles

    return None if plan_file.path is None else bundles.read(plan_file.path, None)


def resolve(plan_file: PlanFile, verified: Bundle | None, folder: Path) -> RolloutPlan:
    """Return the plan with its bundle; `folder` is the fleet's. Raises ConfigError and BadBundle.

    With a repository the bundle must be in it: devices could not download it otherwise.
    """
    bundle, version, digest = plan_file.bundle, plan_file.version, plan_file.digest
    if verified is not None:
        bundle, version, digest = verified.manifest.name, verified.manifest.version, verified.digest
        for key, value in (("bundle", bundle), ("version", version), ("digest", digest)):
            configured = getattr(plan_file, key)
            if configured not in (None, value):
                problem = f"is {configured}, but {plan_file.path} is {value}; remove one of the two"
                raise plan_file.config_error(f"rollout.{key}", problem)
    assert bundle is not None
    assert version is not None
    metadata = folder / "repository" / "metadata"
    if metadata.is_dir():
        digest = _resolve_digest(plan_file, _list_versions(metadata, bundle), bundle, version, digest)
    if digest is None:
        problem = f"{folder} has no repository to look up {bundle} {version} in; create one, or give the digest"
        raise plan_file.config_error("rollout.digest", problem)
    return plan_file.to_plan(bundle, version, digest)


def _list_versions(metadata: Path, bundle: str) -> list[TargetMetadata]:
    """List every published version of a bundle. Raises BadBundle if the metadata cannot be read."""
    pattern = re.compile(rf"([1-9][0-9]{{0,8}})\.{re.escape(bundle)}\.json")
    editions = [(int(match[1]), path) for path in metadata.iterdir() if (match := pattern.fullmatch(path.name))]
    if not editions:
        return []
    newest = max(editions)[1]
    try:
        if newest.stat().st_size > MAX_METADATA_BYTES:
            raise BadBundle(f"{newest}: larger than {MAX_METADATA_BYTES} bytes; is it the repository's?")
        targets = msgspec.json.decode(input_files.read_bytes(newest))["signed"]["targets"].values()
        return [target_metadata.decode(target["custom"]) for target in targets]
    except (OSError, msgspec.MsgspecError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadBundle(f"{newest}: cannot be read ({error}); see `outstation fleet repository status`") from None


def _resolve_digest(
    plan_file: PlanFile, available: list[TargetMetadata], bundle: str, version: str, digest: str | None
) -> str:
    digests = [target.digest for target in available if (target.name, target.version) == (bundle, version)]
    if not digests:
        versions = ", ".join(sorted({target.version for target in available if target.name == bundle})) or "none"
        problem = f"the repository has no {bundle} {version} (it has: {versions})"
        raise plan_file.config_error("rollout.version", f"{problem}; `outstation fleet publish` publishes it")
    if digest is None and len(set(digests)) > 1:
        problem = f"the repository has several {bundle} {version}; give the digest of one"
        raise plan_file.config_error("rollout.digest", problem)
    if digest is not None and digest not in digests:
        problem = f"is {digest}, but the repository's {bundle} {version} is {digests[0]}"
        raise plan_file.config_error("rollout.digest", problem)
    return digest or digests[0]
