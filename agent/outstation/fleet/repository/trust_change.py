"""Changes of the trust document: a draft of the root, and the message that brings roots to devices."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import msgspec

from outstation.fleet import config as fleet_config
from outstation.fleet.config import FleetConfig
from outstation.fleet.repository import expiry, root_rotation, trust
from outstation.fleet.repository.keys import RepositoryKeyring
from outstation.fleet.repository.layout import Layout
from outstation.fleet.repository.root_rotation import RootDraft
from outstation.fleet.repository.trust import TrustEdit
from outstation.foundation import input_files
from outstation.foundation.errors import StorageError
from outstation.protocol.wire import keys
from outstation.protocol.wire.trust import COLLECTOR, OPERATOR, TrustedKey, encode_message


class TrustReport(msgspec.Struct, frozen=True):
    """Trust document in force; `version` is the root's. Without one (`is_config`), the keys of fleet.toml."""

    version: int
    is_config: bool
    keys: list[TrustedKey]
    draft: RootDraft | None


def read(folder: Path) -> TrustReport:
    """Return the keys in force and the draft that waits. Raises UsageError, StorageError."""
    layout = Layout(folder)
    root = root_rotation.load_current_root(layout)
    listed = trust.read_keys(root)
    draft = root_rotation.load_pending_draft(layout, RepositoryKeyring(layout.keys))
    shown = _first_keys(fleet_config.load(folder)) if listed is None else listed
    return TrustReport(root.version, listed is None, shown, draft)


def change(folder: Path, edit: TrustEdit, *, sign_with: Sequence[Path] = (), now: datetime | None = None) -> RootDraft:
    """Draft a root with edited keys, and sign it with the root keys available here.

    With enough signatures it comes into force at once. Raises UsageError.
    """
    layout, now = Layout(folder), now or expiry.now()
    first = _first_keys(fleet_config.load(folder))
    with layout.locked():
        keyring = RepositoryKeyring(layout.keys, sign_with)
        return root_rotation.propose(layout, lambda root: trust.apply_edit(root, edit, first), keyring, now)


def build_message(folder: Path) -> bytes:
    """Return the payload of the retained message for devices. Raises UsageError, StorageError."""
    layout = Layout(folder)
    newest = root_rotation.load_current_root(layout).version
    try:
        roots = [input_files.read_text(layout.root_path(version)) for version in range(1, newest + 1)]
    except (OSError, ValueError) as error:
        raise StorageError(f"{layout.metadata}: a root cannot be read: {error}; restore it from a backup") from None
    return encode_message(roots)


def _first_keys(config: FleetConfig) -> list[TrustedKey]:
    """Return the keys that enrolled devices have in their config."""
    named = ((OPERATOR, config.operator.key_file), (COLLECTOR, config.collector.key_file))
    return [TrustedKey(keys.load_public_for(Path(file)).text, role) for role, file in named]
