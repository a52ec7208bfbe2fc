"""Which bundle a plan is about: as its file says, as a bundle on this disk says, and as the repository has it.

Only read: who signed the repository's metadata is for the devices to verify, against the root they were given.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from agent.errors import BadBundle
from agent.fleet.rollout.plan import File, Plan

MAX_METADATA_BYTES = 16 << 20


class Offered(msgspec.Struct, frozen=True):
    """A bundle as the repository offers it, in `custom` of its target."""

    name: str
    version: str
    digest: str


class _Custom(msgspec.Struct, frozen=True):
    outstation: Offered | None = None


class _Target(msgspec.Struct, frozen=True):
    custom: _Custom = _Custom()


class _Targets(msgspec.Struct, frozen=True):
    targets: dict[str, _Target]


class _Metadata(msgspec.Struct, frozen=True):
    signed: _Targets


class Repository(msgspec.Struct, frozen=True):
    """The repository in the fleet's folder, if there is one."""

    metadata: Path

    @property
    def made(self) -> bool:
        return self.metadata.is_dir()

    def offered(self, bundle: str) -> list[Offered]:
        """Every version of a bundle. Raises BadBundle where the metadata cannot be read."""
        newest = self._newest(bundle)
        if newest is None:
            return []
        try:
            if newest.stat().st_size > MAX_METADATA_BYTES:
                raise BadBundle(f"{newest}: larger than {MAX_METADATA_BYTES} bytes; is it the repository's?")
            told = msgspec.json.decode(newest.read_bytes(), type=_Metadata).signed.targets
        except (OSError, msgspec.MsgspecError, ValueError) as error:
            raise BadBundle(f"{newest}: cannot be read ({error}); see `outstation fleet repository status`") from None
        return [one.custom.outstation for one in told.values() if one.custom.outstation is not None]

    def _newest(self, bundle: str) -> Path | None:
        name = re.compile(rf"([1-9][0-9]{{0,8}})\.{re.escape(bundle)}\.json")
        found = [(int(match[1]), path) for path in self.metadata.iterdir() if (match := name.fullmatch(path.name))]
        return max(found)[1] if found else None


def resolve(file: File, folder: Path) -> Plan:
    """The plan with its bundle. Raises ConfigError and BadBundle: a device could never fetch what is not there."""
    bundle, version, digest = file.bundle, file.version, file.digest
    if file.path is not None:
        there = _read(file.path)
        for key, said, found in (
            ("bundle", bundle, there.name),
            ("version", version, there.version),
            ("digest", digest, there.digest),
        ):
            if said not in (None, found):
                raise file.wrong(f"rollout.{key}", f"is {said}, but {file.path} is {found}; remove one of the two")
        bundle, version, digest = there.name, there.version, there.digest
    assert bundle is not None
    assert version is not None
    repository = Repository(folder / "repository" / "metadata")
    if repository.made:
        digest = _offered(file, repository.offered(bundle), bundle, version, digest)
    if digest is None:
        problem = f"there is no repository in {folder} to look {bundle} {version} up in; make one, or give its digest"
        raise file.wrong("rollout.digest", problem)
    return file.plan(bundle, version, digest)


def _read(path: Path) -> Offered:
    from agent.model.bundle import bundle as bundles

    found = bundles.read(path, None)
    return Offered(found.manifest.name, found.manifest.version, found.digest)


def _offered(file: File, offered: list[Offered], bundle: str, version: str, digest: str | None) -> str:
    same = [one for one in offered if (one.name, one.version) == (bundle, version)]
    there = ", ".join(sorted({one.version for one in offered if one.name == bundle})) or "none"
    if not same:
        problem = (
            f"the repository has no {bundle} {version} (it has: {there}); `outstation fleet publish` puts it there"
        )
        raise file.wrong("rollout.version", problem)
    if digest is None and len({one.digest for one in same}) > 1:
        raise file.wrong("rollout.digest", f"the repository has several {bundle} {version}; say which one")
    if digest is not None and digest not in {one.digest for one in same}:
        found = same[0].digest
        raise file.wrong("rollout.digest", f"is {digest}, but the repository's {bundle} {version} is {found}")
    return digest or same[0].digest
