"""Received evidence folders: problem lists, and new signatures after changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outstation.evidence.format import manifest
from outstation.evidence.verify.reader import VerificationReport
from outstation.evidence.verify.verify import verify
from outstation.protocol.wire.keys import PublicKey, SigningKey

# The key of the folder's operator, to sign altered folders as a dishonest operator could.
OPERATOR: dict[str, SigningKey] = {}


def verified(folder: Path, *keys: PublicKey) -> VerificationReport:
    return verify(folder, list(keys) or [OPERATOR["key"].public])


def problems(folder: Path) -> list[tuple[str, str]]:
    report = verified(folder)
    assert report.ok == (not report.problems)
    return [(entry["file"], entry["problem"]) for entry in report.problems]


def only(folder: Path, file: str, words: str) -> None:
    """Assert that the folder has exactly this problem."""
    [(where, problem)] = problems(folder)
    assert where == file
    assert words in problem


def resign(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """List the files with their current content, `change` the manifest, and sign it."""
    head = json.loads((folder / "manifest.json").read_bytes())
    for file in head["files"]:
        data = (folder / file["path"]).read_bytes()
        file["size"], file["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    change(head)
    write_manifest(folder, json.dumps(head).encode())


def write_manifest(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.jws").write_bytes(manifest.KIND.sign_file(OPERATOR["key"], data))
