"""Bundle: read a bundle from a folder or a `.zip`, and verify every byte before any is used.

Rules of `read`:
- the bundle is flat, with few files, and within a size limit that also holds while a zip member is unpacked
- `manifest.jws` signs `manifest.json` with a publisher's key (not checked if `publishers` is None)
- the manifest lists every other file with its SHA-256, and there is no further file
"""

from __future__ import annotations

import hashlib
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from outstation.foundation import input_files
from outstation.foundation.errors import BadBundle, MessageRefused, UnknownBundle
from outstation.ml.model.bundle import builtin, manifest
from outstation.ml.model.bundle.manifest import Manifest
from outstation.protocol.documents.signed_document import SigningDomain, read_token
from outstation.protocol.wire import jws
from outstation.protocol.wire.keys import PublicKey

if TYPE_CHECKING:
    from zipfile import ZipFile

# All files, unpacked: they are held in memory, on machines with a gigabyte of it.
MAX_BYTES = 256 << 20
MAX_FILES = 32
_TOO_LARGE = f"larger than the {MAX_BYTES >> 20} MiB that a bundle may have"
# Signed in the place of a topic: the signature of a message cannot pass for that of a bundle.
MANIFEST_DOMAIN = SigningDomain("bundle")
# Of members of an archive: stored, and deflated.
_COMPRESSIONS = (0, zlib.DEFLATED)
_UNREADABLE_ERRORS = (OSError, zlib.error, RuntimeError, EOFError, ValueError)


class Bundle(msgspec.Struct, frozen=True):
    """Bundle with its verified bytes in memory. `signer` is the kid that signed it, or claims to, or ""."""

    manifest: Manifest
    digest: str
    files: dict[str, bytes]
    signer: str

    @property
    def model_bytes(self) -> bytes:
        return self.files["model.tflite"]


def read(path: Path, publishers: Sequence[PublicKey] | None) -> Bundle:
    """Return the verified bundle at `path`. With `publishers` None any signer is accepted. Raises BadBundle."""
    return _verify(path, dict(_iter_files(path)), publishers)


def from_files(name: str, files: dict[str, bytes], digest: str) -> Bundle:
    """Return the bundle in `files`, which must have `digest`. Raises BadBundle, with `name` in its text."""
    verified = _verify(Path(name), files, None)
    if verified.digest != digest:
        raise BadBundle(f"{name}: received the bundle {verified.digest}, but {digest} was sent; start it again")
    return verified


def _verify(path: Path, files: dict[str, bytes], publishers: Sequence[PublicKey] | None) -> Bundle:
    for needed in ("manifest.json", "model.tflite"):
        if needed not in files:
            raise BadBundle(f"{path}: has no {needed}; is this a bundle folder or .zip?")
    head = files["manifest.json"]
    signer = _check_signature(path, head, files.get("manifest.jws"), publishers)
    try:
        content = manifest.decode(head)
    except BadBundle as problem:
        raise BadBundle(f"{path}: {problem}") from None
    for name, data in sorted(files.items()):
        if name in ("manifest.json", "manifest.jws"):
            continue
        if name not in content.files:
            raise BadBundle(f"{path}: {name!r} is not listed in the manifest; remove it, or pack the bundle again")
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != content.files[name]:
            raise BadBundle(f"{path}: {name} was altered: its SHA-256 is not the manifest's; get the bundle again")
    for name in content.files:
        if name not in files:
            raise BadBundle(f"{path}: {name!r} is listed in the manifest but missing; get the bundle again")
    return Bundle(content, f"sha256:{hashlib.sha256(head).hexdigest()}", files, signer)


def _check_signature(path: Path, head: bytes, token: bytes | None, publishers: Sequence[PublicKey] | None) -> str:
    if publishers is None:
        try:
            return jws.claimed_kid(read_token(token or b""))
        except MessageRefused:
            return ""
    if token is None:
        raise BadBundle(f"{path}: not signed (no manifest.jws); sign it with `outstation model sign`")
    known = {key.kid: jws.Signer("publisher", key) for key in publishers}
    try:
        return MANIFEST_DOMAIN.check_file(head, token, known.get).key.kid
    except MessageRefused as refusal:
        raise BadBundle(
            f"{path}: {refusal}; the manifest is not signed by any of the {len(known)} trusted publisher keys "
            "([publishers] keys, [operators] keys, or --publisher)"
        ) from None


def _iter_files(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        if path.is_dir():
            yield from _iter_folder(path)
        elif path.is_file():
            yield from _iter_archive(path)
        else:
            raise UnknownBundle(
                f"{path}: no such bundle; give its path, or the name of a built-in one{builtin.suggest_name(path.name)}"
            )
    except _UNREADABLE_ERRORS as error:
        raise BadBundle(f"{path}: cannot be read: {error}") from error


def _iter_folder(path: Path) -> Iterator[tuple[str, bytes]]:
    entries = sorted(path.iterdir())
    _check_file_count(path, len(entries))
    room = MAX_BYTES
    for entry in entries:
        if entry.is_symlink() or not entry.is_file():
            raise BadBundle(f"{path}: {entry.name!r} is not a regular file; a bundle is flat")
        with input_files.open_regular(entry) as file:
            data = file.read(room + 1)
        room = _remaining_bytes(path, room, data)
        yield entry.name, data


def _iter_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.stat().st_size > MAX_BYTES:
        raise BadBundle(f"{path}: {_TOO_LARGE}")
    # A device that runs folders does without it.
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            yield from _iter_members(path, archive)
    except zipfile.BadZipFile as error:
        if not zipfile.is_zipfile(path):
            made_by = "; `outstation model pack --from` makes one of a model" if path.suffix == ".tflite" else ""
            raise BadBundle(f"{path}: is no bundle, which is a folder or a .zip{made_by}") from error
        raise BadBundle(f"{path}: cannot be read: {error}") from error


def _iter_members(path: Path, archive: ZipFile) -> Iterator[tuple[str, bytes]]:
    room, members = MAX_BYTES, archive.infolist()
    _check_file_count(path, len(members))
    if len({m.filename for m in members}) != len(members):
        raise BadBundle(f"{path}: a file is in the archive twice")
    if sum(m.file_size for m in members) > MAX_BYTES:
        # Declared by the archive. A member that is larger than declared fails its checksum.
        raise BadBundle(f"{path}: {_TOO_LARGE}")
    for member in members:
        name = member.filename
        if "/" in name or "\\" in name or name.startswith("."):
            raise BadBundle(
                f"{path}: {name!r} is not a plain file name; a bundle is flat: zip the files of the folder, not "
                "the folder"
            )
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
            raise BadBundle(f"{path}: {name!r} is a link or device; a bundle has regular files only")
        if member.compress_type not in _COMPRESSIONS:
            raise BadBundle(f"{path}: {name!r} has an unsupported compression; use zip's default (deflate)")
        with archive.open(member) as file:
            data = file.read(room + 1)
        room = _remaining_bytes(path, room, data)
        yield member.filename, data


def _check_file_count(path: Path, count: int) -> None:
    if count > MAX_FILES:
        raise BadBundle(f"{path}: {count} files, a bundle has at most {MAX_FILES}")


def _remaining_bytes(path: Path, room: int, data: bytes) -> int:
    if len(data) > room:
        raise BadBundle(f"{path}: {_TOO_LARGE}")
    return room - len(data)
