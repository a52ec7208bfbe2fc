"""The device's signing keys on disk: the one it was given, and those it made itself since.

The given key may lie where nothing can be written (systemd's LoadCredential), so it is never touched. A key made later
is `<data_dir>/keys/<kid of the given key>.key` and counts instead of it; a device that is given another key starts with
that one.
The steps of a change, each on the disk before the next:
- `.next` is written
- the store commits the message that says so, and the kid in `meta`
- the current file becomes `.old`, `.next` becomes the current file
Whatever step a crash comes after, `opened` finds the key that the store has committed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from agent.device.bundles.history import sync_folder
from agent.errors import UsageError
from agent.wire import keys
from agent.wire.keys import SigningKey


class KeyFiles:
    """Those of one device."""

    def __init__(self, data_dir: Path, provisioned: SigningKey) -> None:
        self._folder, self._provisioned = data_dir / "keys", provisioned
        name = provisioned.public.kid
        self._current, self._next, self._old = (self._folder / f"{name}.key{end}" for end in ("", ".next", ".old"))

    def recover(self, committed: str) -> SigningKey:
        """The key in force; `committed` is the kid in the store, "" where it has none. Raises UsageError."""
        if self._next.exists():
            if self._read_kid(self._next) == committed:
                self.promote()
            else:
                self._next.unlink()
        return self.load_active()

    def load_active(self) -> SigningKey:
        """The key in force, for a look beside the daemon. Raises UsageError."""
        return keys.load_private(self._current) if self._current.exists() else self._provisioned

    def load_previous(self) -> SigningKey:
        """The key before the one in force."""
        return keys.load_private(self._old) if self._old.exists() else self._provisioned

    def prepare(self) -> SigningKey:
        """A new key on the disk, in force only once `promote` is called. Raises UsageError, OSError."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._next.unlink(missing_ok=True)
        key = keys.generate(self._next, write_public=False)
        sync_folder(self._folder)
        sync_folder(self._folder.parent)
        return key

    def promote(self) -> None:
        """The key that was prepared is the one in force. Raises OSError."""
        if self._current.exists():
            os.replace(self._current, self._old)
            sync_folder(self._folder)
        os.replace(self._next, self._current)
        sync_folder(self._folder)

    def forget_old(self) -> None:
        """The key before is of no more use here."""
        with contextlib.suppress(OSError):
            self._old.unlink(missing_ok=True)

    def _read_kid(self, path: Path) -> str:
        try:
            return keys.load_private(path).public.kid
        except UsageError:
            # Half a file: it was never committed.
            return ""
