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
from agent.fleet.repository.expiry import TARGETS, TOP_LEVEL_ROLES
from agent.fleet.repository.keys import RepositoryKeyring
from agent.fleet.repository.layout import Layout
from agent.fleet.repository.revoke import get_revocation_day
from agent.model.bundle import bundle as bundles
from agent.model.bundle import golden_vectors
from agent.model.bundle.bundle import Bundle
from agent.model.sandbox import probe
from agent.wire import target_metadata as targets
from agent.wire.keys import PublicKey
from agent.wire.target_metadata import TargetMetadata

# The oldest agent that reads this version's bundles.
_MIN_AGENT_VERSION = "0.1.0"
# A zip's first year: the same files give the same bytes.
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


class PublishResult(msgspec.Struct, frozen=True):
    """`target` is its path in the repository, `bytes` what a device downloads; `new` False: it was there already."""

    target_metadata: TargetMetadata
    target: str
    bytes: int
    signer: str
    is_new: bool


def publish(
    folder: Path,
    path: Path,
    publishers: Sequence[PublicKey],
    *,
    run_probe: bool = True,
    sign_with: Sequence[Path] = (),
    current_time: datetime | None = None,
) -> PublishResult:
    """Offer the bundle at `path`, signed by one of `publishers`, to the devices of the fleet in `folder`.

    `prove` loads it and runs its golden vectors first, which also tells the memory it needs; without that the limit in
    its manifest is told. Raises BadBundle, also for a version that is published with other bytes, and UsageError.
    """
    layout, current_time = Layout(folder), current_time or expiry.now()
    found = bundles.read(path, publishers)
    if found.manifest.name in TOP_LEVEL_ROLES:
        raise BadBundle(f"{path}: {found.manifest.name!r} is the name of a role of the repository; rename the bundle")
    memory = _probe_memory(path, found) if run_probe else found.manifest.limits.memory_mib << 20
    told = build_target_metadata(found, memory)
    target = targets.target_path(told.name, told.version, told.digest)
    packed = build_archive(found)
    with layout.locked():
        keyring = RepositoryKeyring(layout.keys, sign_with)
        now = root_rotation.load_current(layout, keyring, current_time)
        listed = _find_published(now, told)
        if listed is not None:
            return PublishResult(targets.decode(listed.custom), target, listed.length, found.signer, is_new=False)
        file = TargetFile.from_data(target, packed, ["sha256"])
        file.unrecognized_fields["custom"] = targets.encode(told)
        changed = _ensure_delegation(now, told.name, keyring)
        now.bundles[told.name].signed.targets[target] = file
        durable_files.write(layout.target_path(target, file.hashes["sha256"]), packed)
        edition.write(layout, now, changed, keyring, current_time)
    return PublishResult(told, target, len(packed), found.signer, is_new=True)


def build_archive(bundle: Bundle) -> bytes:
    """The verified files as one flat zip, the same bytes each time."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in sorted(bundle.files.items()):
            member = zipfile.ZipInfo(name, _ZIP_EPOCH)
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            out.writestr(member, data)
    return packed.getvalue()


def build_target_metadata(bundle: Bundle, memory: int) -> TargetMetadata:
    """Describe a bundle whose probe took `memory` bytes. Raises BadBundle if its golden vectors cannot be read."""
    manifest = bundle.manifest
    vectors = golden_vectors.decode(bundle.files["golden.npz"]) if "golden.npz" in bundle.files else None
    return TargetMetadata(
        name=manifest.name,
        version=manifest.version,
        digest=bundle.digest,
        kind=manifest.kind,
        fields=manifest.input.fields,
        window=manifest.input.rows,
        agent=_MIN_AGENT_VERSION,
        runtimes=[vectors.runtime.split()[0]] if vectors is not None else [],
        memory=memory,
        unpacked=sum(map(len, bundle.files.values())),
    )


def _probe_memory(path: Path, bundle: Bundle) -> int:
    report = probe.probe(bundle)
    try:
        report.raise_for_failure()
    except BadBundle as problem:
        raise BadBundle(f"{path}: does not run here: {problem}; --no-probe publishes it unproven") from None
    return report.peak_memory


def _find_published(current: Edition, target_metadata: TargetMetadata) -> TargetFile | None:
    """The target where it is published already. Raises BadBundle where the version is, with other bytes."""
    role = current.bundles.get(target_metadata.name)
    if role is None:
        return None
    what, fix = f"{target_metadata.name} {target_metadata.version}", "pack it again under another version"
    for file in role.signed.targets.values():
        other = targets.decode(file.custom)
        if other.version != target_metadata.version:
            continue
        if other.digest != target_metadata.digest:
            raise BadBundle(f"{what} is published as {other.digest}, this one is {target_metadata.digest}; {fix}")
        return file
    if when := get_revocation_day(role.signed, target_metadata.version):
        raise BadBundle(f"{what} was taken out of the repository on {when}; {fix}")
    return None


def _ensure_delegation(current: Edition, name: str, keyring: RepositoryKeyring) -> set[str]:
    """The roles that change; a bundle that is new gets a key of its own, and targets says that it counts."""
    if name in current.bundles:
        return {name}
    if not keyring.signers(current.keyids(TARGETS)):
        raise UsageError(f"{keyring.folder}: the first bundle named {name} needs the targets key; --sign-with names it")
    key = keyring.find_or_generate(f"bundle-{name}-1")
    delegations = current.targets.signed.delegations or Delegations({}, {})
    current.targets.signed.delegations = delegations
    assert delegations.roles is not None
    # Terminating: no other role can ever be asked for what is under this name.
    delegations.roles[name] = DelegatedRole(name, [], 1, True, [f"{name}/*/*"])
    current.targets.signed.add_key(key, name)
    current.bundles[name] = Metadata(Targets())
    return {name, TARGETS}
