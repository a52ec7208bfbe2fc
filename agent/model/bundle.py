"""Read and verify a bundle, a folder or the same as a `.zip`: every byte is checked before any of it is used.

Rules of `read`:
- files lie flat, each within its size limit; a zip member's size is limited while it is read
- `manifest.jws` signs `manifest.json` with a publisher's key (skipped only where no keys are given, to look)
- every other file is listed in the manifest with its SHA-256, and nothing else is there
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.errors import BadBundle, Refused
from agent.model import manifest
from agent.model.manifest import Manifest
from agent.wire import jws
from agent.wire.keys import PublicKey, SigningKey

MAX_FILE = 256 << 20
MAX_FILES = 32
# Stands where a message's topic stands: no signature of a message can pass for one of a bundle.
DOMAIN = "bundle"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose bytes were verified and are held here, so that the files may change on disk meanwhile."""

    manifest: Manifest
    digest: str
    files: dict[str, bytes]
    signer: str

    @property
    def model(self) -> bytes:
        return self.files["model.tflite"]


def read(path: Path, publishers: Sequence[PublicKey] | None) -> Bundle:
    """The verified bundle at `path`; `publishers` None skips the question who signed. Raises BadBundle."""
    files = dict(_files(path))
    for needed in ("manifest.json", "model.tflite"):
        if needed not in files:
            raise BadBundle(f"{path}: no {needed} in it; is this a bundle folder or .zip?")
    head = files["manifest.json"]
    signer = _check_signature(path, head, files.get("manifest.jws"), publishers)
    content = manifest.decode(head)
    listed = content.files
    for name, data in sorted(files.items()):
        if name in ("manifest.json", "manifest.jws"):
            continue
        if name not in listed:
            raise BadBundle(f"{path}: {name} is not listed in the manifest; remove it, or pack the bundle again")
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != listed[name]:
            raise BadBundle(f"{path}: {name} was altered: its SHA-256 is not the manifest's; get the bundle again")
    for name in listed:
        if name not in files:
            raise BadBundle(f"{path}: {name} is listed in the manifest but missing; get the bundle again")
    return Bundle(content, f"sha256:{hashlib.sha256(head).hexdigest()}", files, signer)


def sign(head: bytes, key: SigningKey) -> bytes:
    """The content of `manifest.jws`."""
    return jws.sign(key, DOMAIN, head).encode() + b"\n"


def _check_signature(path: Path, head: bytes, token: bytes | None, publishers: Sequence[PublicKey] | None) -> str:
    if token is None:
        if publishers is None:
            return ""
        raise BadBundle(f"{path}: not signed (no manifest.jws); sign it with `outstation model sign`")
    text = token.decode("ascii", "replace").strip()
    if publishers is None:
        return jws.claimed_kid(text)
    known = {key.kid: jws.Signer("publisher", key) for key in publishers}
    try:
        return jws.verify([text], DOMAIN, head, known.get).key.kid
    except Refused as refusal:
        raise BadBundle(
            f"{path}: {refusal}; the manifest is not signed by any of the {len(known)} trusted publisher keys "
            "([publishers] keys, [operators] keys, or --key)"
        ) from None


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        if path.is_dir():
            yield from _folder(path)
        elif path.is_file():
            yield from _archive(path)
        else:
            raise BadBundle(f"{path}: no such bundle")
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise BadBundle(f"{path}: cannot be read: {error}") from error


def _folder(path: Path) -> Iterator[tuple[str, bytes]]:
    entries = sorted(path.iterdir())
    _limit_count(path, len(entries))
    for entry in entries:
        if entry.is_symlink() or not entry.is_file():
            raise BadBundle(f"{path}: {entry.name} is no plain file; a bundle is flat")
        with entry.open("rb") as file:
            yield entry.name, _limited(path, entry.name, file.read(MAX_FILE + 1))


def _archive(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _limit_count(path, len(members))
        if len({m.filename for m in members}) != len(members):
            raise BadBundle(f"{path}: a file is in the archive twice")
        for member in members:
            if "/" in member.filename or "\\" in member.filename or member.filename.startswith("."):
                raise BadBundle(f"{path}: {member.filename!r} is no plain file name; a bundle is flat")
            with archive.open(member) as file:
                yield member.filename, _limited(path, member.filename, file.read(MAX_FILE + 1))


def _limit_count(path: Path, count: int) -> None:
    if count > MAX_FILES:
        raise BadBundle(f"{path}: {count} files, a bundle has at most {MAX_FILES}")


def _limited(path: Path, name: str, data: bytes) -> bytes:
    if len(data) > MAX_FILE:
        raise BadBundle(f"{path}: {name} is larger than {MAX_FILE >> 20} MiB")
    return data
