"""A bundle into the repository, under a role of its own name."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import msgspec
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, TargetFile, Targets

from agent import durable_files
from agent.errors import BadBundle, UsageError
from agent.fleet.repository import edition, expiry, root_rotation
from agent.fleet.repository.edition import Edition
from agent.fleet.repository.expiry import TARGETS, TOP
from agent.fleet.repository.keys import Keyring
from agent.fleet.repository.layout import Layout
from agent.fleet.repository.revoke import revoked
from agent.model.bundle import bundle as bundles
from agent.model.bundle import target_metadata as offer
from agent.model.bundle.bundle import Bundle
from agent.model.bundle.target_metadata import Offer
from agent.model.sandbox import probe
from agent.wire.keys import PublicKey

# A zip's first year: the same files give the same bytes.
_NO_TIME = (1980, 1, 1, 0, 0, 0)


class Published(msgspec.Struct, frozen=True):
    """`target` is its path in the repository, `bytes` what a device downloads; `new` False: it was there already."""

    offer: Offer
    target: str
    bytes: int
    signer: str
    new: bool


def publish(
    folder: Path,
    path: Path,
    publishers: Sequence[PublicKey],
    *,
    prove: bool = True,
    sign_with: Sequence[Path] = (),
    at: datetime | None = None,
) -> Published:
    """Offer the bundle at `path`, signed by one of `publishers`, to the devices of the fleet in `folder`.

    `prove` loads it and runs its golden vectors first, which also tells the memory it needs; without that the limit in
    its manifest is told. Raises BadBundle, also for a version that is published with other bytes, and UsageError.
    """
    layout, at = Layout(folder), at or expiry.now()
    found = bundles.read(path, publishers)
    if found.manifest.name in TOP:
        raise BadBundle(f"{path}: {found.manifest.name!r} is the name of a role of the repository; rename the bundle")
    told = offer.of(found, _proven(path, found) if prove else found.manifest.limits.memory_mib << 20)
    target = offer.target_path(told.name, told.version, told.digest)
    packed = archive(found)
    with layout.locked():
        keyring = Keyring(layout.keys, sign_with)
        now = root_rotation.current(layout, keyring, at)
        listed = _listed(now, told)
        if listed is not None:
            return Published(offer.decode(listed.custom), target, listed.length, found.signer, new=False)
        file = TargetFile.from_data(target, packed, ["sha256"])
        file.unrecognized_fields["custom"] = offer.encode(told)
        changed = _delegate(now, told.name, keyring)
        now.bundles[told.name].signed.targets[target] = file
        durable_files.write(layout.target(target, file.hashes["sha256"]), packed)
        edition.write(layout, now, changed, keyring, at)
    return Published(told, target, len(packed), found.signer, new=True)


def archive(bundle: Bundle) -> bytes:
    """The verified files as one flat zip, the same bytes each time."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in sorted(bundle.files.items()):
            member = zipfile.ZipInfo(name, _NO_TIME)
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            out.writestr(member, data)
    return packed.getvalue()


def _proven(path: Path, bundle: Bundle) -> int:
    report = probe.probe(bundle)
    try:
        report.require()
    except BadBundle as problem:
        raise BadBundle(f"{path}: does not run here: {problem}; --no-probe publishes it unproven") from None
    return report.memory


def _listed(now: Edition, told: Offer) -> TargetFile | None:
    """The target where it is published already. Raises BadBundle where the version is, with other bytes."""
    role = now.bundles.get(told.name)
    if role is None:
        return None
    what, fix = f"{told.name} {told.version}", "pack it again under another version"
    for file in role.signed.targets.values():
        other = offer.decode(file.custom)
        if other.version != told.version:
            continue
        if other.digest != told.digest:
            raise BadBundle(f"{what} is published as {other.digest}, this one is {told.digest}; {fix}")
        return file
    if when := revoked(role.signed, told.version):
        raise BadBundle(f"{what} was taken out of the repository on {when}; {fix}")
    return None


def _delegate(now: Edition, name: str, keyring: Keyring) -> set[str]:
    """The roles that change; a bundle that is new gets a key of its own, and targets says that it counts."""
    if name in now.bundles:
        return {name}
    if not keyring.signers(now.keyids(TARGETS)):
        raise UsageError(f"{keyring.folder}: the first bundle named {name} needs the targets key; --sign-with names it")
    key = keyring.make_or_find(f"bundle-{name}-1")
    delegations = now.targets.signed.delegations or Delegations({}, {})
    now.targets.signed.delegations = delegations
    assert delegations.roles is not None
    # Terminating: no other role can ever be asked for what is under this name.
    delegations.roles[name] = DelegatedRole(name, [], 1, True, [f"{name}/*/*"])
    now.targets.signed.add_key(key, name)
    now.bundles[name] = Metadata(Targets())
    return {name, TARGETS}
