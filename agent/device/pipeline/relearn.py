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

from agent.clock import Now
from agent.device.pipeline import drift_state
from agent.device.pipeline.batch import Task
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction

log = logging.getLogger("outstation")

REQUEST, DONE = "reference request", "reference request done"
_MOST_BYTES = 4096
_unreadable: set[Path] = set()


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`learn` for at least `for_s` seconds of readings, or `reset`: learn as the config says."""

    id: str
    what: str
    for_s: float = 0.0
    by: str = "on the device"

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)


def made(what: str, for_s: float = 0.0, by: str = "on the device") -> Request:
    return Request(id=uuid.uuid4().hex, what=what, for_s=for_s, by=by)


def ask(data_dir: Path, task: str, request: Request) -> None:
    """Leave `request` for the daemon, or for the next `outstation batch`. Raises OSError.

    Asked by root, folder and file are the data folder's owner's, as the daemon is that user.
    """
    file, root = _file(data_dir, task), os.geteuid() == 0
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


def waiting(store: Store, task: str) -> Request | None:
    """What is asked for and not taken up yet; the file's first."""
    done = store.state(task, DONE)
    for content in (_content(_file(store.path.parent, task)), store.state(task, REQUEST)):
        if content is None:
            continue
        with contextlib.suppress(msgspec.DecodeError, msgspec.ValidationError):
            found = msgspec.json.decode(content, type=Request)
            if found.id.encode() != done:
                return found
    return None


def take_up(task: Task, store: Store, author: Author, now: Now) -> bool:
    """Begin to learn, if somebody asked for it; whether it was. Raises StorageError."""
    request = waiting(store, task.name)
    if request is None:
        _clear(store, task.name)
        return False
    if task.judge is None or task.drift is None:
        with store.transaction() as tx:
            _note(tx, task.name, request)
        _clear(store, task.name)
        return False
    fresh, cleared = task.judge.relearn(task.drift, request.for_s)
    summary = (
        f"{task.name}: asked {request.by} to {request.what} the site's reference; it is learned anew, "
        "and drift is not told until that is done."
    )
    old = task.drift.site
    evidence = {
        "task": task.name,
        "asked": request.what,
        "for_s": request.for_s,
        "site": old.digest if old else None,
        "number": old.site.number if old and old.site else None,
        "by": request.by,
    }
    with store.transaction() as tx:
        drift_state.keep(tx, task.name, task.judge, fresh, task.drift)
        _note(tx, task.name, request)
        for alert in cleared:
            author.write(tx, "alerts", task.name, alert.body(task.name), now)
        event = {"event": "reference reset", "summary": summary, "evidence": evidence}
        author.write(tx, "audit", None, event, now)
    task.drift = fresh
    _clear(store, task.name)
    return True


def _note(tx: Transaction, task: str, request: Request) -> None:
    tx.drop(task, REQUEST)
    tx.keep(task, DONE, request.id.encode())


def _file(data_dir: Path, task: str) -> Path:
    return data_dir / "requests" / f"{task}.reference.json"


def _content(file: Path) -> bytes | None:
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


def _clear(store: Store, task: str) -> None:
    """Of the file that was taken up, or is none of ours."""
    with contextlib.suppress(OSError):
        _file(store.path.parent, task).unlink()
