"""A stamp's three files: heads (.json), request (.tsq) and response (.tsr), which other tools for RFC 3161 read too."""

from __future__ import annotations

from pathlib import Path

import msgspec

from agent import durable_files, input_files
from agent.errors import UsageError
from agent.fleet.evidence.timestamps import log_heads

SUFFIXES = HEADS, REQUEST, RESPONSE = ".json", ".tsq", ".tsr"
# Of a request or a response; a response with a chain of certificates has about 6 kB.
MAX_TOKEN_BYTES = 64 << 10


class Stamp(msgspec.Struct, frozen=True):
    """Content of the three files. `name` is that of the response, for messages to people."""

    name: str
    heads: bytes
    request: bytes
    response: bytes


def require_new(out: Path) -> None:
    """Raise UsageError if a file of a stamp of this name exists, or its folder does not."""
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: its folder does not exist; create it first")
    for suffix in SUFFIXES:
        if (path := with_suffix(out, suffix)).exists():
            raise UsageError(f"--out {out}: {path} exists already; a stamp is never overwritten, so use a new name")


def write(out: Path, *contents: bytes) -> None:
    """Write a stamp's heads, request, and response if there is one. Raises StorageError."""
    for suffix, content in zip(SUFFIXES, contents, strict=False):
        durable_files.write(with_suffix(out, suffix), content)


def read(path: Path) -> Stamp:
    """Read the stamp whose response is at `path`. Raises UsageError."""
    stem = path.with_suffix("")
    heads = _read(with_suffix(stem, HEADS), log_heads.MAX_BYTES)
    request = _read(with_suffix(stem, REQUEST), MAX_TOKEN_BYTES)
    return Stamp(str(path), heads, request, _read(path, MAX_TOKEN_BYTES))


def with_suffix(stem: Path, suffix: str) -> Path:
    """Return the file of a stamp. A stem may have dots of its own, as dates do."""
    return stem.with_name(stem.name + suffix)


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with input_files.open_regular(path) as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        problem = "a stamp has three files of one name: .json, .tsq and .tsr"
        raise UsageError(f"{path}: cannot be read: {error.strerror}; {problem}") from None
    if len(data) > max_bytes:
        raise UsageError(f"{path}: larger than {max_bytes} bytes, the limit of this file of a stamp")
    return data
