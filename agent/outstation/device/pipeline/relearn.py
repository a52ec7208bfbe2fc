"""Reference requests: an operator, here or by remote command, has a site reference learned again or accepts it.

The daemon owns the store, so a person on this machine leaves a file in the data folder; a remote command leaves the
same in the store. The task applies a request when it next runs, in one commit with the audit message. The request's id
keeps a crash between the commit and the deletion of the file from applying it twice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from pathlib import Path
from typing import Literal

import msgspec

from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog, PendingMessage
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import decoders, input_files
from outstation.foundation.clock import ClockReading

log = logging.getLogger("outstation")

Action = Literal["relearn", "reset", "accept"]

_MAX_BYTES = 4096
_unreadable: set[Path] = set()


class RelearnRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Request to learn the site reference again, from at least `duration_s` of readings or (`reset`) as configured.

    `accept` accepts one that deviates.
    """

    id: str
    action: Action
    duration_s: float = 0.0
    requested_by: str = "on the device"

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)


def make_request(action: Action, duration_s: float = 0.0, requested_by: str = "on the device") -> RelearnRequest:
    return RelearnRequest(id=uuid.uuid4().hex, action=action, duration_s=duration_s, requested_by=requested_by)


def submit_request(data_dir: Path, task: str, request: RelearnRequest) -> None:
    """Leave `request` for the daemon, or for the next `outstation batch`. Raises OSError.

    If root calls this, folder and file are given to the owner of the data folder: the daemon runs as that user.
    """
    file, is_root = _request_path(data_dir, task), os.geteuid() == 0
    owner = data_dir.stat()
    file.parent.mkdir(mode=0o700, exist_ok=True)
    # By descriptor and never through a link: the owner of the folder must not make root write elsewhere.
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if is_root:
            os.fchown(folder, owner.st_uid, owner.st_gid)
        part = file.with_suffix(".part").name
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part, dir_fd=folder)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
        with os.fdopen(descriptor, "wb") as content:
            if is_root:
                os.fchown(content.fileno(), owner.st_uid, owner.st_gid)
            content.write(request.to_json())
        os.replace(part, file.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)


def pending_request(store: Store, task: str) -> RelearnRequest | None:
    """Return the request that is not applied yet; the file's before the store's."""
    done = store.load_state(task, task_keys.RELEARN_REQUEST_DONE)
    file = _request_path(store.path.parent, task)
    for content in (_read_request(file), store.load_state(task, task_keys.RELEARN_REQUEST)):
        if content is None:
            continue
        with contextlib.suppress(msgspec.DecodeError, msgspec.ValidationError):
            request = decoders.from_json(content, RelearnRequest)
            if request.id.encode() != done:
                return request
    return None


def apply_pending(task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading) -> bool:
    """Apply the pending request; return True if it had an effect. Raises StorageError."""
    request = pending_request(store, task.name)
    if request is None:
        _delete_request(store, task.name)
        return False
    drift = task.drift
    if drift is None:
        with store.transaction() as tx:
            _mark_done(tx, task.name, request)
        _delete_request(store, task.name)
        return False
    old = drift.state.site_reference
    if request.action == "accept":
        state, cleared = drift.monitor.accept_reference(drift.state)
        effect = (
            "later ones are compared with it" if old else "there is none yet, but the sensors are accepted as they are"
        )
        event = "reference accepted"
    else:
        state, cleared = drift.monitor.relearn(drift.state, request.duration_s)
        event, effect = "reference reset", "it is learned again, and drift is not tested until then"
    messages = [*(drift.closing_messages or ()), *(PendingMessage.from_alert(alert, task.name) for alert in cleared)]
    summary = f"{task.name}: {request.action} of the site reference was requested {request.requested_by}; {effect}."
    evidence = {
        "task": task.name,
        "asked": request.action,
        "for_s": request.duration_s,
        "site": old.digest if old else None,
        "number": old.site.number if old and old.site else None,
        "by": request.requested_by,
    }
    messages.append(PendingMessage.audit(event, summary, evidence))
    with store.transaction() as tx:
        drift.save_state(tx, state)
        _mark_done(tx, task.name, request)
        message_log.append_all(tx, messages, now)
    drift.replace_state(state)
    _delete_request(store, task.name)
    return True


def _mark_done(tx: Transaction, task: str, request: RelearnRequest) -> None:
    tx.delete_state(task, task_keys.RELEARN_REQUEST)
    tx.save_state(task, task_keys.RELEARN_REQUEST_DONE, request.id.encode())


def _request_path(data_dir: Path, task: str) -> Path:
    return data_dir / "requests" / f"{task}.reference.json"


def _read_request(file: Path) -> bytes | None:
    try:
        with input_files.open_regular(file) as stream:
            content = stream.read(_MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        # The file is read before every batch; the error is logged once.
        if file not in _unreadable:
            _unreadable.add(file)
            log.warning(
                "%s: the request cannot be read: %s; repeat the command as root, or give the folder to this user",
                *(file, error.strerror),
            )
        return None
    _unreadable.discard(file)
    return content


def _delete_request(store: Store, task: str) -> None:
    """Delete the file, once it is applied or if it holds no request."""
    with contextlib.suppress(OSError):
        _request_path(store.path.parent, task).unlink()
