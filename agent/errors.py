"""Every error of this project, split by whose fault it is.

OutstationError
├── UsageError        the person at the keyboard or the config file; exit code 2
│   ├── ConfigError   names the file, the key and the fix
│   └── Busy          another run writes that file; it may be done in a while
├── Rejected          one row or line of a producer
├── Refused           a message from a peer that does not verify
├── BadBundle         a bundle that is damaged, unsigned, foreign or does not run here
│   └── ModelDied     a model that ran apart and crashed, hung or failed
├── FetchFailed       a bundle that could not be fetched, or must not be; names the error
├── LinkDown          the broker or the network
└── StorageError      the disk or the database
    ├── StorageFull
    ├── StorageBusy   another process owns the store
    ├── StorageDamaged  the database is not what was written; the next opening salvages it
    └── StorageForked   the store went back in time; the next opening begins a new log
"""

from __future__ import annotations

from typing import Literal


class OutstationError(Exception):
    """Base of all errors that are reported to people in one line."""


class UsageError(OutstationError):
    """Wrong use of a command."""


class ConfigError(UsageError):
    """Wrong config: `file`, `key` and a sentence with the fix."""

    def __init__(self, file: str, key: str, problem: str) -> None:
        super().__init__(f"{file}: {key}: {problem}" if key else f"{file}: {problem}")
        self.file, self.key, self.problem = file, key, problem


class FileBusy(UsageError):
    """Another process writes the file."""


class RowRejected(OutstationError):
    """A row or line that is not taken; the reason goes back to its producer."""


class MessageRefused(OutstationError):
    """A message that does not verify; `reason` is one of a small set, `detail` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class BadBundle(OutstationError):
    """A bundle that must not be activated."""


class ModelProcessFailed(BadBundle):
    """A model that runs apart crashed, hung, or gave an error: `kind` says which; the sentence says more."""

    def __init__(self, kind: Literal["crash", "hang", "error"], detail: str) -> None:
        super().__init__(f"the model {_FAILURE_VERBS[kind]}: {detail}")
        self.kind, self.detail = kind, detail


_FAILURE_VERBS = {"crash": "crashed", "hang": "hangs", "error": "failed"}


class FetchFailed(OutstationError):
    """What a repository gives is not there, not whole or not to be trusted; `error` names it, `detail` says more."""

    def __init__(self, error: str, detail: str) -> None:
        super().__init__(f"{error}: {detail}")
        self.error, self.detail = error, detail


class LinkDown(OutstationError):
    """The connection to the broker is not there, or was lost."""


class StorageError(OutstationError):
    """The store cannot be read or written; what was not committed is not there."""


class StorageFull(StorageError):
    """The quota or the disk is full; nothing of this transaction was kept."""


class StorageBusy(StorageError):
    """Another daemon owns this data folder."""


class StorageDamaged(StorageError):
    """The database file is damaged; opening it again salvages what can be read."""


class StorageForked(StorageError):
    """The collector has messages of this log that this store never wrote; opening it again begins a new log."""
