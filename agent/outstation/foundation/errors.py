"""Error tree of the project, by cause: user, peer, bundle, network, disk.

OutstationError
├── UsageError              command line or config file; exit code 2
│   ├── ConfigError         names the file, the key and the fix
│   └── FileBusy            another process writes the file
├── RowRejected             a row or line of a producer
├── MessageRefused          a message that does not verify
├── BadBundle               a bundle that is damaged, unsigned or does not run here
│   ├── UnknownBundle       named by a config or command, and not there; a UsageError, too
│   └── ModelProcessFailed  a model in its own process crashed, hung or failed
├── FetchFailed             a bundle that cannot or must not be fetched
├── LinkDown                the broker or the network
└── StorageError            the disk or the database
    ├── StorageFull
    ├── StorageBusy         another process owns the store
    ├── StorageDamaged      the next opening salvages the database
    └── StorageForked       the store went back in time; the next opening begins a new log
"""

from __future__ import annotations

import errno
from typing import Any, Literal

_REMEDIES = {
    errno.ENOENT: "check the name",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "a part of this path is a file; name a folder",
    errno.EEXIST: "name another one",
    errno.EACCES: "run this with sudo, or change who may use it",
    errno.EPERM: "run this with sudo, or change who may use it",
    errno.EROFS: "name a place that can be written to",
    errno.ENOSPC: "free some space",
    errno.ELOOP: "this link leads back to itself",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ECONNREFUSED: "nothing listens there: start the {}, or correct the address",
    errno.ENETUNREACH: "check this machine's network",
    errno.EHOSTUNREACH: "check this machine's network, and that the other machine is on",
    errno.ETIMEDOUT: "check the address, and that a firewall lets this port through",
}


def explain(error: OSError, server: str = "broker") -> str:
    """Return what the system says and what to do about it; the caller names the file or address.

    `server`: what should listen at an address.
    """
    text = error.strerror or str(error)
    if isinstance(error, TimeoutError):
        # That of a file is about a pipe, whose reason says it all.
        return text if error.filename else f"no answer in time; {_REMEDIES[errno.ETIMEDOUT]}"
    if type(error).__name__ == "gaierror":
        return f"{text}; check the name of the machine, and this machine's DNS"
    remedy = _REMEDIES.get(error.errno or 0, "").format(server)
    return f"{text}; {remedy}" if remedy else text


class OutstationError(Exception):
    """Base of all errors that are reported in one line."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without a call of `__init__`, whose arguments differ: worker processes hand errors over."""
        return _make, (type(self), self.args), self.__dict__


def _make(kind: type[OutstationError], args: tuple[Any, ...]) -> OutstationError:
    return kind.__new__(kind, *args)


class UsageError(OutstationError):
    """Wrong use of a command."""


class ConfigError(UsageError):
    """Invalid config: `file`, `key` and a sentence with the fix."""

    def __init__(self, file: str, key: str, problem: str) -> None:
        super().__init__(f"{file}: {key}: {problem}" if key else f"{file}: {problem}")
        self.file, self.key, self.problem = file, key, problem


class FileBusy(UsageError):
    """Another process writes the file."""


class RowRejected(OutstationError):
    """A rejected row or line; the reason is returned to its producer."""


class MessageRefused(OutstationError):
    """A message that does not verify; `reason` is one of a small set, `detail` adds to it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class BadBundle(OutstationError):
    """A bundle that must not be activated."""


class UnknownBundle(BadBundle, UsageError):
    """A config or command names a bundle that does not exist."""


class ModelProcessFailed(BadBundle):
    """A model in its own process crashed, hung or failed, by `kind`; `detail` adds to it."""

    def __init__(self, kind: Literal["crash", "hang", "error"], detail: str) -> None:
        super().__init__(f"the model {_FAILURE_VERBS[kind]}: {detail}")
        self.kind, self.detail = kind, detail


_FAILURE_VERBS = {"crash": "crashed", "hang": "hangs", "error": "failed"}


class FetchFailed(OutstationError):
    """A download is missing, incomplete or not trusted; `error` names the cause, `detail` adds to it."""

    def __init__(self, error: str, detail: str) -> None:
        super().__init__(f"{error}: {detail}")
        self.error, self.detail = error, detail


class LinkDown(OutstationError):
    """The connection to the broker failed or was lost. `traffic_bytes`: moved by one that was not established."""

    traffic_bytes = 0


class PacketTooLarge(LinkDown):
    """The broker ended the connection because of a packet larger than it takes, and announces no limit."""


class StorageError(OutstationError):
    """The store cannot be read or written; the open transaction was rolled back."""


class StorageFull(StorageError):
    """The quota or the disk is full; the transaction was rolled back."""


class StorageBusy(StorageError):
    """Another daemon owns this data folder."""


class StorageMoved(StorageError):
    """The data folder is no longer the one that was opened. A start there would begin an empty store."""


class StorageDamaged(StorageError):
    """The database file is damaged; opening it again salvages the readable part."""


class StorageForked(StorageError):
    """The collector has messages that this store never wrote; opening it again begins a new log."""
