"""Revocation of a bundle: devices that have not downloaded it never will."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import cast

import msgspec
from tuf.api.metadata import Targets

from outstation.fleet.repository import edition, expiry, root_rotation
from outstation.fleet.repository.keys import RepositoryKeyring
from outstation.fleet.repository.layout import Layout
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import UsageError
from outstation.protocol.wire import target_metadata

# Field of the bundle role's signed metadata: version → day. A revoked version is never published again.
_REVOKED_FIELD = "outstation-revoked"


class RevocationResult(msgspec.Struct, frozen=True):
    bundle: str
    versions: list[str]


def revoke(
    folder: Path,
    bundle: str,
    version: str | None = None,
    *,
    sign_with: Sequence[Path] = (),
    now: datetime | None = None,
) -> RevocationResult:
    """Remove one `version` of a bundle, or all. Raises UsageError if there is none.

    Devices that run it continue until a roll-out replaces it.
    """
    layout, now = Layout(folder), now or expiry.now()
    with layout.locked():
        keyring = RepositoryKeyring(layout.keys, sign_with)
        current = root_rotation.load_current(layout, keyring, now)
        if bundle not in current.bundles:
            hint = did_you_mean(bundle, current.bundles, "none was published yet")
            raise UsageError(f"no bundle {bundle!r} in the repository{hint}")
        role = current.bundles[bundle].signed
        versions = {target_metadata.decode(file.custom).version: path for path, file in role.targets.items()}
        revoked_versions = list(versions) if version is None else [version]
        if not revoked_versions or not set(revoked_versions) <= set(versions):
            here = ", ".join(sorted(versions)) or "none"
            raise UsageError(f"{bundle} {version or ''} is not in the repository; published versions: {here}")
        for revoked in revoked_versions:
            del role.targets[versions[revoked]]
        role.unrecognized_fields[_REVOKED_FIELD] = {
            **get_revoked_versions(role),
            **dict.fromkeys(revoked_versions, f"{now:%Y-%m-%d}"),
        }
        edition.write(layout, current, {bundle}, keyring, now)
    return RevocationResult(bundle, revoked_versions)


def get_revoked_versions(role: Targets) -> dict[str, str]:
    """Return version → day of revocation."""
    return cast("dict[str, str]", role.unrecognized_fields.get(_REVOKED_FIELD, {}))
