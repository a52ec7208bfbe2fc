"""An evidence folder as somebody receives it: what is wrong with it, and its signature made anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.fleet.evidence.format import manifest
from agent.fleet.evidence.verify.reader import VerificationReport
from agent.fleet.evidence.verify.verify import verify
from agent.wire.keys import PublicKey, SigningKey

# So that a folder can be signed again as a dishonest operator would.
OPERATOR: dict[str, SigningKey] = {}


def verified(folder: Path, *keys: PublicKey) -> VerificationReport:
    return verify(folder, list(keys) or [OPERATOR["key"].public])


def problems(folder: Path) -> list[tuple[str, str]]:
    report = verified(folder)
    assert report.ok == (not report.problems)
    return [(one["file"], one["problem"]) for one in report.problems]


def only(folder: Path, file: str, words: str) -> None:
    """Exactly one thing is wrong, and this is it."""
    [(where, what)] = problems(folder)
    assert where == file
    assert words in what


def resign(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """List the files as they are now, `change` the manifest, sign it."""
    head = json.loads((folder / "manifest.json").read_bytes())
    for one in head["files"]:
        data = (folder / one["path"]).read_bytes()
        one["size"], one["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    change(head)
    write_manifest(folder, json.dumps(head).encode())


def write_manifest(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.jws").write_bytes(manifest.sign(data, OPERATOR["key"]))
