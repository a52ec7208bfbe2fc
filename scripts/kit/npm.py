"""Packages of npm for interoperability runs, installed once beneath the cache."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outstation.workbench.testing.process import MissingProgram, find_program
from scripts.kit.steps import CACHE

SPARKPLUG = "sparkplug-payload@1.0.3"
NODE_RED = "node-red@4.1.15"
_DECODE = """
import sparkplug from 'sparkplug-payload'; import fs from 'node:fs';
const payloads = JSON.parse(fs.readFileSync(0, 'utf-8'));
const decode = hex => sparkplug.get('spBv1.0').decodePayload(Buffer.from(hex, 'hex'));
const plain = (key, value) => typeof value === 'bigint' ? Number(value) : value?.toNumber ? value.toNumber() : value;
console.log(JSON.stringify(payloads.map(decode), plain));
"""


def install(package: str, timeout_s: float = 600.0) -> Path:
    """Return a folder with the package. Raises MissingProgram without node, npm or the registry."""
    name, _, version = package.partition("@")
    folder = CACHE / "npm" / package.replace("@", "-")
    installed = folder / "node_modules" / name / "package.json"
    if installed.exists() and json.loads(installed.read_text(encoding="utf-8"))["version"] == version:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    command = [find_program("npm"), "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), package]
    try:
        subprocess.run(command, check=True, timeout=timeout_s, capture_output=True)
    except (subprocess.SubprocessError, OSError) as error:
        raise MissingProgram(f"{package} of npm, which could not be installed: {error}") from None
    return folder


def decode_sparkplug(payloads: Sequence[bytes], timeout_s: float = 600.0) -> list[dict[str, Any]]:
    """Decode payloads by the library of the Eclipse Tahu project. Raises MissingProgram without it."""
    script = install(SPARKPLUG, timeout_s) / "decode.mjs"
    script.write_text(_DECODE, encoding="utf-8")
    given = json.dumps([payload.hex() for payload in payloads]).encode()
    done = subprocess.run([find_program("node"), script], input=given, capture_output=True, timeout=60, check=True)
    decoded: list[dict[str, Any]] = json.loads(done.stdout)
    return decoded
