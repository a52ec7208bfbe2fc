"""`outstation fleet evidence verify`: a folder from anywhere, checked with public keys and nothing else.

Rules, in order:
- the manifest's signature fits one of the keys that were given; only then is the manifest read
- every file of the folder is a plain file that the manifest lists, with that size and digest, and none is missing
- every message in messages/ was signed by a device key that the manifest lists, and no two are one
- what decisions, incidents, accuracy and what runs say of a message is what that message says
- decisions of roll-outs are signed by an operator's key that the manifest lists, and follow each other
- a bundle's manifest has the digest it is told by; where it is said to be checked, its publisher signed it

Nothing is followed out of the folder, nothing is unpacked, no file is read beyond the size that was signed.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from agent.errors import Refused, UsageError
from agent.fleet.evidence import contents, manifest
from agent.fleet.evidence.claims import Claims
from agent.fleet.evidence.limits import BOUNDS
from agent.fleet.evidence.manifest import MANIFEST, TOKEN, File, Key, Manifest
from agent.fleet.evidence.papers import check_bundle
from agent.jsonkeys import check_keys
from agent.wire import jws
from agent.wire.jws import Signer
from agent.wire.keys import PublicKey, public_key
from agent.wire.messages import Logged, open_message

T = TypeVar("T")


@dataclass
class Report:
    """What was checked and what is wrong; all problems are counted, the first are told."""

    fleet: str = ""
    at: str = ""
    signer: str = ""
    files: int = 0
    messages: int = 0
    decisions: int = 0
    bundles: int = 0
    unsupported: int = 0
    problem_count: int = 0
    problems: list[dict[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problem_count

    def add(self, file: str, problem: str) -> None:
        self.problem_count += 1
        if len(self.problems) < BOUNDS.problems:
            self.problems.append({"file": file, "problem": problem})

    def document(self) -> dict[str, Any]:
        """As `verify --json` prints it."""
        names = ("fleet", "at", "signer", "files", "messages", "decisions", "bundles", "unsupported")
        head = {"ok": self.ok, **{name: getattr(self, name) for name in names}}
        return {**head, "problem_count": self.problem_count, "problems": self.problems}


def verify(folder: Path, keys: list[PublicKey]) -> Report:
    """Raises UsageError where there is no folder."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    report = Report()
    head = _manifest(folder, keys, report)
    if head is None:
        return report
    report.fleet, report.at = head.fleet, head.at
    present = _present(folder, head, report)
    good = {one.path: one for one in head.files if one.path in present and _same(folder, one, report)}
    report.files = len(good)
    _contents(_Opened(folder, good, report), head, report)
    return report


def _manifest(folder: Path, keys: list[PublicKey], report: Report) -> Manifest | None:
    data = _whole(folder, MANIFEST, BOUNDS.manifest, report)
    token = _whole(folder, TOKEN, BOUNDS.token, report)
    if data is None or token is None:
        return None
    known = {key.kid: Signer("operator", key) for key in keys}
    try:
        text = token.decode("ascii", "replace").strip()
        report.signer = jws.verify((text,), manifest.DOMAIN, data, known.get).key.kid
    except Refused as refusal:
        report.add(TOKEN, f"{refusal}: {MANIFEST} is not signed by any of the {len(known)} keys that were given")
        return None
    try:
        return manifest.decode(data)
    except Refused as refusal:
        report.add(MANIFEST, str(refusal))
        return None


def _whole(folder: Path, name: str, most: int, report: Report) -> bytes | None:
    try:
        with _open(folder, name) as file:
            data = file.read(most + 1)
    except OSError as error:
        report.add(name, _why(error))
        return None
    if len(data) > most:
        report.add(name, f"is larger than {most} bytes")
        return None
    return data


# --- files ---


def _present(folder: Path, head: Manifest, report: Report) -> set[str]:
    """The listed files that are there as plain files; everything else in the folder is a problem."""
    listed = {one.path for one in head.files}
    found: set[str] = set()
    for path, kind in _entries(folder, report):
        if kind == "file" and path in listed:
            found.add(path)
        elif path in (MANIFEST, TOKEN) and kind == "file":
            continue
        elif kind == "file":
            report.add(path, "is not listed in the manifest: it was not there when this was signed")
        else:
            report.add(path, f"is a {kind}; an evidence folder has plain files only")
    for path in sorted(listed - found):
        if not any(problem["file"] == path for problem in report.problems):
            report.add(path, "is listed in the manifest, and missing")
    return found


def _entries(folder: Path, report: Report) -> Iterator[tuple[str, str]]:
    """(path, kind) of everything in the folder but plain folders; nothing is followed."""
    waiting, seen = [""], 0
    while waiting:
        inside = waiting.pop()
        try:
            entries = sorted(os.scandir(folder / inside), key=lambda entry: entry.name)
        except OSError as error:
            report.add(inside, _why(error))
            continue
        for entry in entries:
            seen += 1
            if seen > 2 * BOUNDS.files:
                report.add(inside or ".", f"more than {2 * BOUNDS.files} entries; the rest is not looked at")
                return
            path = f"{inside}/{entry.name}" if inside else entry.name
            if entry.is_dir(follow_symlinks=False):
                if path.count("/") < 3:
                    waiting.append(path)
                else:
                    yield _shown(path), "folder deeper than any listed file can lie"
            else:
                yield _shown(path), _kind(entry)


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "symbolic link"
    return "file" if entry.is_file(follow_symlinks=False) else "device, pipe or socket"


def _same(folder: Path, one: File, report: Report) -> bool:
    """Whether it has the size and the bytes that were signed. No more than the size is read."""
    try:
        with _open(folder, one.path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != one.size:
                report.add(one.path, f"has {size} bytes, the manifest says {one.size}")
                return False
            if _sha256(file, one.size) == one.sha256:
                return True
    except OSError as error:
        report.add(one.path, _why(error))
        return False
    report.add(one.path, "was altered: its SHA-256 is not the manifest's")
    return False


def _sha256(file: BinaryIO, size: int) -> str:
    found = hashlib.sha256()
    while size > 0 and (data := file.read(min(size, 1 << 20))):
        found.update(data)
        size -= len(data)
    return found.hexdigest()


def _open(folder: Path, path: str) -> BinaryIO:
    """A plain file in the folder; no step of the way is a link."""
    *folders, name = path.split("/")
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in folders:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = inner
        # Without O_NONBLOCK opening a pipe would wait for a writer.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is no plain file")
    return os.fdopen(descriptor, "rb")


def _why(error: OSError) -> str:
    if error.errno == 40:
        return "is a symbolic link; an evidence folder has plain files only"
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"


def _shown(path: str) -> str:
    return path.encode(errors="backslashreplace").decode()


# --- what they say ---


@dataclass
class _Opened:
    """Files whose bytes are those that were signed."""

    folder: Path
    good: dict[str, File]
    report: Report

    def document(self, path: str, type_: type[T]) -> T | None:
        """A file read whole; None where it is not there, or not what it should be."""
        if path not in self.good:
            return None
        if self.good[path].size > BOUNDS.document:
            self.report.add(path, f"is larger than {BOUNDS.document} bytes, the limit for such a file")
            return None
        data = _whole(self.folder, path, BOUNDS.document, self.report)
        return None if data is None else self._decoded(path, data, type_)

    def lines(self, path: str, type_: type[T]) -> Iterator[tuple[int, T]]:
        """(number, line) of a file of JSON lines."""
        if path not in self.good:
            return
        with _open(self.folder, path) as file:
            number = 0
            while line := file.readline(BOUNDS.line + 1):
                number += 1
                if len(line) > BOUNDS.line:
                    self.report.add(path, f"line {number} is longer than {BOUNDS.line} bytes; the rest is not read")
                    return
                one = self._decoded(f"{path}:{number}", line, type_)
                if one is not None:
                    yield number, one

    def _decoded(self, path: str, data: bytes, type_: type[T]) -> T | None:
        try:
            found = msgspec.json.decode(data, type=type_)
            check_keys(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            self.report.add(path, f"is not what such a file holds: {str(error)[:200]}")
            return None
        return found


def _contents(opened: _Opened, head: Manifest, report: Report) -> None:
    messages = {one.path for one in head.files if one.path.startswith("messages/")}
    claims = Claims(head, report.add, whole=messages <= set(opened.good))
    _messages(opened, head, claims, report)
    for number, decision in opened.lines("decisions.jsonl", contents.Decision):
        claims.decision(f"decisions.jsonl:{number}", decision)
    for i, incident in enumerate(opened.document("incidents.json", list[contents.Incident]) or []):
        claims.incident(f"incidents.json[{i}]", incident)
    for i, one in enumerate(opened.document("running.json", list[contents.Running]) or []):
        claims.running(f"running.json[{i}]", one)
    for i, measured in enumerate(opened.document("accuracy.json", list[contents.Measured]) or []):
        claims.measured(f"accuracy.json[{i}]", measured)
    claims.finish()
    report.decisions, report.unsupported = claims.decisions, claims.unsupported
    publishers = _signers(head.keys, "publisher")
    for path in sorted(opened.good):
        if path.startswith("bundles/") and path.endswith("/about.json"):
            card = opened.document(path, contents.Card)
            if card is not None:
                report.bundles += 1
                read = _papers(opened, path.removesuffix("/about.json"), report)
                check_bundle(path, card, read, publishers, report.add)


def _papers(opened: _Opened, folder: str, report: Report) -> Callable[[str], bytes | None]:
    def read(name: str) -> bytes | None:
        path = f"{folder}/{name}"
        return _whole(opened.folder, path, BOUNDS.document, report) if path in opened.good else None

    return read


def _messages(opened: _Opened, head: Manifest, claims: Claims, report: Report) -> None:
    devices = _Devices(head.keys)
    for path in sorted(path for path in opened.good if path.startswith("messages/")):
        for number, line in opened.lines(path, contents.Signed):
            if report.messages >= BOUNDS.messages:
                report.add(path, f"more than {BOUNDS.messages} messages in all; the rest is not read")
                return
            report.messages += 1
            where = f"{path}:{number}"
            try:
                message = open_message(line.topic, line.payload.encode(), (line.jws,), devices.find)
                if message.topic.fleet != head.fleet:
                    raise Refused("other fleet", f"signed for {message.topic.fleet!r}")
                devices.require_in_bounds(message.signer.key.kid, message.body)
            except (Refused, UnicodeEncodeError) as refused:
                report.add(where, f"does not verify: {refused}")
                continue
            claims.message(where, message)


class _Devices:
    """Device keys of the manifest. A revoked key's messages count: they were stored before it was revoked."""

    def __init__(self, keys: list[Key]) -> None:
        self._bounds = {key.kid: key for key in keys if key.role == "device"}
        self._signers = _signers(keys, "device")
        self.find = self._signers.get

    def require_in_bounds(self, kid: str, body: object) -> None:
        key = self._bounds[kid]
        if key.through is None or not isinstance(body, Logged):
            return
        if key.log in (None, body.log) and body.seq > key.through:
            raise Refused("retired key", f"kid {kid} signs up to seq {key.through} only")


def _signers(keys: list[Key], role: str) -> dict[str, Signer]:
    return {key.kid: Signer(key.owner, public_key(key.key)) for key in keys if key.role == role}
