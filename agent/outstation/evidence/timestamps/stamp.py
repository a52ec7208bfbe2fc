"""A stamp's three files: heads (.json), request (.tsq) and response (.tsr), which other tools for RFC 3161 read too."""

from __future__ import annotations

from pathlib import Path

import msgspec

from outstation.evidence.timestamps import log_heads
from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import UsageError

SUFFIXES = HEADS, REQUEST, RESPONSE = ".json", ".tsq", ".tsr"
# Most bytes of a request or a response; a response with a chain of certificates has about 6 kB.
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
    files = {
        with_suffix(stem, HEADS): log_heads.MAX_BYTES,
        with_suffix(stem, REQUEST): MAX_TOKEN_BYTES,
        path: MAX_TOKEN_BYTES,
    }
    hint = "a stamp has three files of one name: .json, .tsq and .tsr"
    return Stamp(str(path), *(input_files.read_input(file, limit, hint=hint) for file, limit in files.items()))


def with_suffix(stem: Path, suffix: str) -> Path:
    """Return the file of a stamp. A stem may have dots of its own, as dates do."""
    return stem.with_name(stem.name + suffix)
