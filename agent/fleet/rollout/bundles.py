"""Which bundle a plan is about: as its file says, as a bundle on this disk says, and as the repository has it.

Only read: who signed the repository's metadata is for the devices to verify, against the root they were given.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from agent.errors import BadBundle
from agent.fleet.rollout.plan import PlanFile, RolloutPlan

MAX_METADATA_BYTES = 16 << 20


class TargetMetadata(msgspec.Struct, frozen=True):
    """A bundle as the repository offers it, in `custom` of its target."""

    name: str
    version: str
    digest: str


class _Custom(msgspec.Struct, frozen=True):
    outstation: TargetMetadata | None = None


class _Target(msgspec.Struct, frozen=True):
    custom: _Custom = _Custom()


class _Targets(msgspec.Struct, frozen=True):
    targets: dict[str, _Target]


class _Metadata(msgspec.Struct, frozen=True):
    signed: _Targets


class RepositoryMetadata(msgspec.Struct, frozen=True):
    """The repository in the fleet's folder, if there is one."""

    metadata: Path

    @property
    def exists(self) -> bool:
        return self.metadata.is_dir()

    def list_versions(self, bundle: str) -> list[TargetMetadata]:
        """Every version of a bundle. Raises BadBundle where the metadata cannot be read."""
        newest = self._find_newest_metadata(bundle)
        if newest is None:
            return []
        try:
            if newest.stat().st_size > MAX_METADATA_BYTES:
                raise BadBundle(f"{newest}: larger than {MAX_METADATA_BYTES} bytes; is it the repository's?")
            told = msgspec.json.decode(newest.read_bytes(), type=_Metadata).signed.targets
        except (OSError, msgspec.MsgspecError, ValueError) as error:
            raise BadBundle(f"{newest}: cannot be read ({error}); see `outstation fleet repository status`") from None
        return [one.custom.outstation for one in told.values() if one.custom.outstation is not None]

    def _find_newest_metadata(self, bundle: str) -> Path | None:
        name = re.compile(rf"([1-9][0-9]{{0,8}})\.{re.escape(bundle)}\.json")
        found = [(int(match[1]), path) for path in self.metadata.iterdir() if (match := name.fullmatch(path.name))]
        return max(found)[1] if found else None


def resolve(plan_file: PlanFile, folder: Path) -> RolloutPlan:
    """The plan with its bundle. Raises ConfigError and BadBundle: a device could never fetch what is not there."""
    bundle, version, digest = plan_file.bundle, plan_file.version, plan_file.digest
    if plan_file.path is not None:
        there = _read_bundle(plan_file.path)
        for key, said, found in (
            ("bundle", bundle, there.name),
            ("version", version, there.version),
            ("digest", digest, there.digest),
        ):
            if said not in (None, found):
                raise plan_file.config_error(
                    f"rollout.{key}", f"is {said}, but {plan_file.path} is {found}; remove one of the two"
                )
        bundle, version, digest = there.name, there.version, there.digest
    assert bundle is not None
    assert version is not None
    repository = RepositoryMetadata(folder / "repository" / "metadata")
    if repository.exists:
        digest = _resolve_digest(plan_file, repository.list_versions(bundle), bundle, version, digest)
    if digest is None:
        problem = f"there is no repository in {folder} to look {bundle} {version} up in; make one, or give its digest"
        raise plan_file.config_error("rollout.digest", problem)
    return plan_file.to_plan(bundle, version, digest)


def _read_bundle(path: Path) -> TargetMetadata:
    from agent.model.bundle import bundle as bundles

    found = bundles.read(path, None)
    return TargetMetadata(found.manifest.name, found.manifest.version, found.digest)


def _resolve_digest(
    plan_file: PlanFile, available: list[TargetMetadata], bundle: str, version: str, digest: str | None
) -> str:
    same = [one for one in available if (one.name, one.version) == (bundle, version)]
    there = ", ".join(sorted({one.version for one in available if one.name == bundle})) or "none"
    if not same:
        problem = (
            f"the repository has no {bundle} {version} (it has: {there}); `outstation fleet publish` puts it there"
        )
        raise plan_file.config_error("rollout.version", problem)
    if digest is None and len({one.digest for one in same}) > 1:
        raise plan_file.config_error("rollout.digest", f"the repository has several {bundle} {version}; say which one")
    if digest is not None and digest not in {one.digest for one in same}:
        found = same[0].digest
        raise plan_file.config_error(
            "rollout.digest", f"is {digest}, but the repository's {bundle} {version} is {found}"
        )
    return digest or same[0].digest
