"""Reader of an untrusted evidence folder. It follows no link and reads no file beyond its signed size."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from outstation.evidence.format.contents import READ_LIMITS
from outstation.evidence.format.manifest import MANIFEST_FILE, SIGNATURE_FILE, EvidenceManifest, FileEntry
from outstation.foundation import decoders
from outstation.foundation.strict_json import check_strict_json
from outstation.foundation.text import printable

T = TypeVar("T")


class VerificationReport(msgspec.Struct):
    """Result of a verification: what verified, and the problems. All problems are counted, the first are listed.

    `signatures` counts valid signatures of the TUF metadata, `chained_messages` links of hash chains, `gaps` ranges
    without one, `witnesses` valid log heads, `stamps` valid time stamps, and `unchecked_stamps` those that nobody
    trusted an authority for. `stamped_at` is the newest valid stamp's time.
    """

    fleet: str = ""
    as_of: str = ""
    signer: str = ""
    files: int = 0
    messages: int = 0
    decisions: int = 0
    bundles: int = 0
    comparisons: int = 0
    signatures: int = 0
    unsupported: int = 0
    chained_messages: int = 0
    gaps: int = 0
    witnesses: int = 0
    stamps: int = 0
    unchecked_stamps: int = 0
    stamped_at: str = ""
    problem_count: int = 0
    problems: list[dict[str, str]] = msgspec.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problem_count

    def add_problem(self, file: str, problem: str) -> None:
        self.problem_count += 1
        if len(self.problems) < READ_LIMITS.problems:
            self.problems.append({"file": file, "problem": problem})

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `verify --json` prints."""
        return {"ok": self.ok, **msgspec.structs.asdict(self)}


class FolderReader(msgspec.Struct):
    """Access to the files whose size and SHA-256 are as signed."""

    folder: Path
    verified_files: dict[str, FileEntry]
    report: VerificationReport

    def read_document(self, path: str, type_: type[T]) -> T | None:
        """Return the decoded file; None if it is not verified or malformed, which is then reported."""
        if path not in self.verified_files:
            return None
        if self.verified_files[path].size > READ_LIMITS.document_bytes:
            limit = f"{READ_LIMITS.document_bytes} bytes, the limit for such a file"
            self.report.add_problem(path, f"is larger than {limit}")
            return None
        data = read_file(self.folder, path, READ_LIMITS.document_bytes, self.report)
        return None if data is None else self._decode(path, data, type_)

    def read_bytes(self, path: str) -> bytes | None:
        """Return the content of a document; None if it is not verified."""
        if path not in self.verified_files:
            return None
        return read_file(self.folder, path, READ_LIMITS.document_bytes, self.report)

    def read_lines(self, path: str, type_: type[T]) -> Iterator[tuple[int, T]]:
        """Yield (number, record) of each valid line of a JSON Lines file."""
        if path not in self.verified_files:
            return
        with _open_plain_file(self.folder, path) as file:
            number = 0
            while line := file.readline(READ_LIMITS.line_bytes + 1):
                number += 1
                if len(line) > READ_LIMITS.line_bytes:
                    problem = f"line {number} is longer than {READ_LIMITS.line_bytes} bytes; the rest is not read"
                    self.report.add_problem(path, problem)
                    return
                record = self._decode(f"{path}:{number}", line, type_)
                if record is not None:
                    yield number, record

    def _decode(self, path: str, data: bytes, type_: type[T]) -> T | None:
        try:
            record = decoders.from_json(data, type_)
            check_strict_json(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            self.report.add_problem(path, f"is malformed: {str(error)[:200]}")
            return None
        return record


def read_file(folder: Path, name: str, max_bytes: int, report: VerificationReport) -> bytes | None:
    """Return the file's bytes. If it cannot be read or exceeds `max_bytes`, report that and return None."""
    try:
        with _open_plain_file(folder, name) as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        report.add_problem(name, _describe_error(error))
        return None
    if len(data) > max_bytes:
        report.add_problem(name, f"is larger than {max_bytes} bytes")
        return None
    return data


def find_listed_files(folder: Path, head: EvidenceManifest, report: VerificationReport) -> set[str]:
    """Return the listed files that exist as regular files. Report missing files and every other entry."""
    listed = {file.path for file in head.files}
    present: set[str] = set()
    for path, kind in _walk_entries(folder, report):
        if kind == "file" and path in listed:
            present.add(path)
        elif path in (MANIFEST_FILE, SIGNATURE_FILE) and kind == "file":
            continue
        elif kind == "file":
            report.add_problem(path, "is not listed in the manifest: it was added after signing")
        else:
            report.add_problem(path, f"is a {kind}; an evidence folder has regular files only")
    for path in sorted(listed - present):
        if not any(problem["file"] == path for problem in report.problems):
            report.add_problem(path, "is listed in the manifest but missing")
    return present


def _walk_entries(folder: Path, report: VerificationReport) -> Iterator[tuple[str, str]]:
    """Yield (path, kind) of every entry except folders, without following links."""
    waiting, seen = [""], 0
    while waiting:
        inside = waiting.pop()
        try:
            entries = sorted(os.scandir(folder / inside), key=lambda entry: entry.name)
        except OSError as error:
            report.add_problem(inside, _describe_error(error))
            continue
        for entry in entries:
            seen += 1
            if seen > 2 * READ_LIMITS.files:
                problem = f"has more than {2 * READ_LIMITS.files} entries; the rest is not checked"
                report.add_problem(inside or ".", problem)
                return
            path = f"{inside}/{entry.name}" if inside else entry.name
            if entry.is_dir(follow_symlinks=False):
                if path.count("/") < 3:
                    waiting.append(path)
                else:
                    yield printable(path), "folder nested deeper than any listed file"
            else:
                kind = "file" if entry.is_file(follow_symlinks=False) else "device, pipe or socket"
                yield printable(path), "symbolic link" if entry.is_symlink() else kind


def is_unaltered(folder: Path, entry: FileEntry, report: VerificationReport) -> bool:
    """Return True if the file has the signed size and SHA-256. At most the signed size is read."""
    try:
        with _open_plain_file(folder, entry.path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.size:
                report.add_problem(entry.path, f"has {size} bytes, the manifest says {entry.size}")
                return False
            if _sha256(file, entry.size) == entry.sha256:
                return True
    except OSError as error:
        report.add_problem(entry.path, _describe_error(error))
        return False
    report.add_problem(entry.path, "was altered: its SHA-256 differs from the manifest")
    return False


def _sha256(file: BinaryIO, size: int) -> str:
    checksum = hashlib.sha256()
    while size > 0 and (data := file.read(min(size, 1 << 20))):
        checksum.update(data)
        size -= len(data)
    return checksum.hexdigest()


def _open_plain_file(folder: Path, path: str) -> BinaryIO:
    """Open a regular file in the folder. No segment of its path may be a link."""
    *folders, name = path.split("/")
    parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in folders:
            child = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
            os.close(parent)
            parent = child
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
    finally:
        os.close(parent)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is not a regular file")
    return os.fdopen(descriptor, "rb")


def _describe_error(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "is a symbolic link; an evidence folder has regular files only"
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
