"""Publication of a bundle in the repository, under a role of the bundle's name."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import msgspec
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, TargetFile, Targets

from outstation.fleet.repository import edition, expiry, root_rotation
from outstation.fleet.repository.edition import Edition
from outstation.fleet.repository.expiry import TARGETS, TOP_LEVEL_ROLES
from outstation.fleet.repository.keys import RepositoryKeyring
from outstation.fleet.repository.layout import Layout
from outstation.fleet.repository.revoke import get_revoked_versions
from outstation.foundation import durable_files
from outstation.foundation.errors import BadBundle, UsageError
from outstation.ml.model.bundle import bundle as bundles
from outstation.ml.model.bundle import golden_vectors
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.sandbox import probe
from outstation.protocol.wire import target_metadata
from outstation.protocol.wire.keys import PublicKey
from outstation.protocol.wire.target_metadata import TargetMetadata

# The oldest agent that reads this version's bundles.
_MIN_AGENT_VERSION = "0.1.0"
# A fixed time: equal files give equal bytes.
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


class PublishResult(msgspec.Struct, frozen=True):
    """Result: path in the repository and download size. `is_new` is False if it was published already."""

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
    now: datetime | None = None,
) -> PublishResult:
    """Publish the bundle at `path`, signed by one of `publishers`, for the devices of the fleet in `folder`.

    The probe loads the bundle and runs its golden vectors first, and measures its memory; without it, the memory limit
    of the manifest counts. Raises UsageError, and BadBundle, also for a version published with other bytes.
    """
    layout, now = Layout(folder), now or expiry.now()
    bundle = bundles.read(path, publishers)
    if bundle.manifest.name in TOP_LEVEL_ROLES:
        raise BadBundle(f"{path}: {bundle.manifest.name!r} is a top-level role of the repository; rename the bundle")
    memory = bundle.manifest.limits.memory_mib << 20
    if run_probe:
        report = probe.probe(bundle)
        try:
            report.raise_for_failure()
        except BadBundle as problem:
            hint = "--no-probe publishes it without this check"
            raise BadBundle(f"{path}: does not run here: {problem}; {hint}") from None
        memory = report.peak_memory
    metadata = build_target_metadata(bundle, memory)
    target = target_metadata.target_path(metadata.name, metadata.version, metadata.digest)
    archive = build_archive(bundle)
    with layout.locked():
        keyring = RepositoryKeyring(layout.keys, sign_with)
        current = root_rotation.load_current(layout, keyring, now)
        _require_known_features(current, metadata)
        listed = _find_published(current, metadata)
        if listed is not None:
            published = target_metadata.decode(listed.custom)
            return PublishResult(published, target, listed.length, bundle.signer, is_new=False)
        file = TargetFile.from_data(target, archive, ["sha256"])
        file.unrecognized_fields["custom"] = target_metadata.encode(metadata)
        changed = _ensure_delegation(current, metadata.name, keyring)
        current.bundles[metadata.name].signed.targets[target] = file
        durable_files.write(layout.target_path(target, file.hashes["sha256"]), archive)
        edition.write(layout, current, changed, keyring, now)
    return PublishResult(metadata, target, len(archive), bundle.signer, is_new=True)


def build_archive(bundle: Bundle) -> bytes:
    """Return the verified files as one flat zip. Equal files give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(bundle.files.items()):
            member = zipfile.ZipInfo(name, _ZIP_EPOCH)
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(member, data)
    return buffer.getvalue()


def build_target_metadata(bundle: Bundle, memory: int) -> TargetMetadata:
    """Describe a bundle whose probe took `memory` bytes. Raises BadBundle if its golden vectors cannot be read."""
    manifest, features = bundle.manifest, bundle.manifest.input.features
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
        features=None if features is None else (features.name, features.version, features.digest),
    )


def _require_known_features(current: Edition, metadata: TargetMetadata) -> None:
    """Raise BadBundle if a published bundle has other features under the same name and version."""
    if metadata.features is None:
        return
    for role in current.bundles.values():
        for file in role.signed.targets.values():
            other = target_metadata.decode(file.custom)
            is_same_version = other.features is not None and other.features[:2] == metadata.features[:2]
            if is_same_version and other.features != metadata.features:
                assert other.features is not None
                name, version, digest = other.features
                raise BadBundle(
                    f"{metadata.name} {metadata.version}: its features {name} {version} have {metadata.features[2]}, "
                    f"but those of the published {other.name} {other.version} have {digest}; restore the feature file, "
                    "or give it a new version, and pack the bundle again"
                )


def _find_published(current: Edition, metadata: TargetMetadata) -> TargetFile | None:
    """Return the target if it is published already. Raises BadBundle if the version has other bytes or is revoked."""
    role = current.bundles.get(metadata.name)
    if role is None:
        return None
    label, fix = f"{metadata.name} {metadata.version}", "pack it again under another version"
    for file in role.signed.targets.values():
        other = target_metadata.decode(file.custom)
        if other.version != metadata.version:
            continue
        if other.digest != metadata.digest:
            raise BadBundle(f"{label} is published with digest {other.digest}, this one has {metadata.digest}; {fix}")
        return file
    if day := get_revoked_versions(role.signed).get(metadata.version, ""):
        raise BadBundle(f"{label} was revoked on {day}; {fix}")
    return None


def _ensure_delegation(current: Edition, name: str, keyring: RepositoryKeyring) -> set[str]:
    """Return the roles to write. A new bundle gets its own key, which targets then lists."""
    if name in current.bundles:
        return {name}
    if not keyring.signers(current.keyids(TARGETS)):
        raise UsageError(f"{keyring.folder}: the first bundle named {name} needs the targets key; use --sign-with FILE")
    key = keyring.find_or_generate(f"bundle-{name}-1")
    delegations = current.targets.signed.delegations or Delegations({}, {})
    current.targets.signed.delegations = delegations
    assert delegations.roles is not None
    # Terminating: no other role can serve targets under this name.
    delegations.roles[name] = DelegatedRole(name, [], 1, True, [f"{name}/*/*"])
    current.targets.signed.add_key(key, name)
    current.bundles[name] = Metadata(Targets())
    return {name, TARGETS}
