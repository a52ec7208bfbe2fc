"""Learning a site's drift reference anew, because somebody asked: on this machine, or by a command from the fleet.

The daemon owns the store. Who asks on this machine leaves a file in the data folder; a command leaves the same in the
store. Either is taken up when the task next runs, in one commit with its audit message; a request is known by its id,
so that a crash between commit and the file's end does nothing twice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from pathlib import Path

import msgspec

from agent.clock import ClockReading
from agent.device.pipeline import drift_state
from agent.device.pipeline.batch import LoadedTask
from agent.device.store import task_keys
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction

log = logging.getLogger("outstation")

_MOST_BYTES = 4096
_unreadable: set[Path] = set()


class RelearnRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`learn` for at least `for_s` seconds of readings, or `reset`: learn as the config says."""

    id: str
    action: str
    duration_s: float = 0.0
    requested_by: str = "on the device"

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)


def make_request(action: str, duration_s: float = 0.0, requested_by: str = "on the device") -> RelearnRequest:
    return RelearnRequest(id=uuid.uuid4().hex, action=action, duration_s=duration_s, requested_by=requested_by)


def submit_request(data_dir: Path, task: str, request: RelearnRequest) -> None:
    """Leave `request` for the daemon, or for the next `outstation batch`. Raises OSError.

    Asked by root, folder and file are the data folder's owner's, as the daemon is that user.
    """
    file, root = _request_path(data_dir, task), os.geteuid() == 0
    owner = data_dir.stat()
    file.parent.mkdir(mode=0o700, exist_ok=True)
    # By descriptor and never through a link: the owner of the folder must not make root write elsewhere.
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if root:
            os.fchown(folder, owner.st_uid, owner.st_gid)
        part = file.with_suffix(".part").name
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part, dir_fd=folder)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
        with os.fdopen(descriptor, "wb") as content:
            if root:
                os.fchown(content.fileno(), owner.st_uid, owner.st_gid)
            content.write(request.to_json())
        os.replace(part, file.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)


def pending_request(store: Store, task: str) -> RelearnRequest | None:
    """What is asked for and not taken up yet; the file's first."""
    done = store.load_state(task, task_keys.RELEARN_REQUEST_DONE)
    for content in (
        _read_request(_request_path(store.path.parent, task)),
        store.load_state(task, task_keys.RELEARN_REQUEST),
    ):
        if content is None:
            continue
        with contextlib.suppress(msgspec.DecodeError, msgspec.ValidationError):
            found = msgspec.json.decode(content, type=RelearnRequest)
            if found.id.encode() != done:
                return found
    return None


def apply_pending(task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading) -> bool:
    """Begin to learn, if somebody asked for it; whether it was. Raises StorageError."""
    request = pending_request(store, task.name)
    if request is None:
        _delete_request(store, task.name)
        return False
    if task.drift_monitor is None or task.drift_state is None:
        with store.transaction() as tx:
            _mark_done(tx, task.name, request)
        _delete_request(store, task.name)
        return False
    fresh, cleared = task.drift_monitor.relearn(task.drift_state, request.duration_s)
    summary = (
        f"{task.name}: asked {request.requested_by} to {request.action} the site's reference; it is learned anew, "
        "and drift is not told until that is done."
    )
    old = task.drift_state.site_reference
    evidence = {
        "task": task.name,
        "asked": request.action,
        "for_s": request.duration_s,
        "site": old.digest if old else None,
        "number": old.site.number if old and old.site else None,
        "by": request.requested_by,
    }
    with store.transaction() as tx:
        drift_state.save(tx, task.name, task.drift_monitor, fresh, task.drift_state)
        _mark_done(tx, task.name, request)
        for alert in cleared:
            message_log.append(tx, "alerts", task.name, alert.to_body(task.name), now)
        event = {"event": "reference reset", "summary": summary, "evidence": evidence}
        message_log.append(tx, "audit", None, event, now)
    task.drift_state = fresh
    _delete_request(store, task.name)
    return True


def _mark_done(tx: Transaction, task: str, request: RelearnRequest) -> None:
    tx.delete_state(task, task_keys.RELEARN_REQUEST)
    tx.save_state(task, task_keys.RELEARN_REQUEST_DONE, request.id.encode())


def _request_path(data_dir: Path, task: str) -> Path:
    return data_dir / "requests" / f"{task}.reference.json"


def _read_request(file: Path) -> bytes | None:
    try:
        with file.open("rb") as content:
            found = content.read(_MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        # It is looked at before every batch; said once is enough.
        if file not in _unreadable:
            _unreadable.add(file)
            text = "%s: what is asked for there cannot be read: %s; ask again as root, or give the folder to this user"
            log.warning(text, file, error.strerror)
        return None
    _unreadable.discard(file)
    return found


def _delete_request(store: Store, task: str) -> None:
    """Of the file that was taken up, or is none of ours."""
    with contextlib.suppress(OSError):
        _request_path(store.path.parent, task).unlink()
