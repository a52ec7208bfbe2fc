"""A bundle out of the repository: devices that have not fetched it never will."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import cast

import msgspec
from tuf.api.metadata import Targets

from agent.errors import UsageError
from agent.fleet.repository import edition, expiry, root_rotation
from agent.fleet.repository.keys import RepositoryKeyring
from agent.fleet.repository.layout import Layout
from agent.toml_files import did_you_mean
from agent.wire import target_metadata

# In the bundle role's signed part: version → day. A version that was taken out is never another one later.
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
    current_time: datetime | None = None,
) -> RevocationResult:
    """Take `version` of `bundle` out, or all that there are. Raises UsageError where there is none.

    What a device runs already goes on: a roll-out to another version replaces it.
    """
    layout, current_time = Layout(folder), current_time or expiry.now()
    with layout.locked():
        keyring = RepositoryKeyring(layout.keys, sign_with)
        now = root_rotation.load_current(layout, keyring, current_time)
        if bundle not in now.bundles:
            raise UsageError(f"no bundle {bundle!r} in the repository{did_you_mean(bundle, list(now.bundles))}")
        role = now.bundles[bundle].signed
        versions = {target_metadata.decode(file.custom).version: path for path, file in role.targets.items()}
        out = list(versions) if version is None else [version]
        if not out or not set(out) <= set(versions):
            here = ", ".join(sorted(versions)) or "none"
            raise UsageError(f"{bundle} {version or ''} is not in the repository; versions there: {here}")
        for one in out:
            del role.targets[versions[one]]
        role.unrecognized_fields[_REVOKED_FIELD] = {
            **get_revoked_versions(role),
            **dict.fromkeys(out, f"{current_time:%Y-%m-%d}"),
        }
        edition.write(layout, now, {bundle}, keyring, current_time)
    return RevocationResult(bundle, out)


def get_revocation_day(role: Targets, version: str) -> str:
    """The day on which a version was taken out, "" where it was not."""
    return get_revoked_versions(role).get(version, "")


def get_revoked_versions(role: Targets) -> dict[str, str]:
    """Version → day."""
    return cast("dict[str, str]", role.unrecognized_fields.get(_REVOKED_FIELD, {}))
