"""Interoperability with `jose` from npm: our messages verify, altered ones do not."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from outstation.workbench.testing.messages import MessageSender, SignedMessage, new_key

VERIFY = """
import { flattenedVerify, generalVerify, importJWK } from "jose";
import { readFileSync } from "node:fs";

const { jwk, messages } = JSON.parse(readFileSync(0, "utf8"));
const key = await importJWK(jwk);
const verdicts = [];
for (const { jws, payload } of messages) {
  const [protectedHeader, middle, signature] = jws.split(".");
  const bytes = Buffer.from(payload, "base64");
  const verdict = { middle };
  try {
    const flat = await flattenedVerify({ protected: protectedHeader, payload: bytes, signature }, key);
    verdict.flattened = Buffer.from(flat.payload).toString("base64");
    verdict.header = flat.protectedHeader;
  } catch (error) { verdict.flattened = error.code; }
  try {
    const all = await generalVerify({ payload: bytes, signatures: [{ protected: protectedHeader, signature }] }, key);
    verdict.general = Buffer.from(all.payload).toString("base64");
  } catch (error) { verdict.general = error.code; }
  verdicts.push(verdict);
}
console.log(JSON.stringify(verdicts));
"""
KEY = new_key(1)
REFUSED = "ERR_JWS_SIGNATURE_VERIFICATION_FAILED"


@pytest.fixture(scope="module")
def jose(
    pytestconfig: pytest.Config, program: Callable[[str], str]
) -> Callable[[list[SignedMessage]], list[dict[str, Any]]]:
    """`jose(messages)` is what the library says of each; it is installed once, in pytest's cache."""
    node, npm = program("node"), program("npm")
    cache = getattr(pytestconfig, "cache", None)
    folder = cache.mkdir("jose") if cache else pytest.skip("pytest runs without a cache")
    if not (folder / "node_modules" / "jose").exists():
        _install(npm, folder)
    (folder / "verify.mjs").write_text(VERIFY)

    def verify(messages: list[SignedMessage]) -> list[dict[str, Any]]:
        requests = [{"jws": m.jws, "payload": base64.b64encode(m.payload).decode()} for m in messages]
        document = json.dumps({"jwk": KEY.public.jwk, "messages": requests})
        done = subprocess.run(
            [node, "verify.mjs"], cwd=folder, input=document, capture_output=True, text=True, check=True
        )
        return list(json.loads(done.stdout))

    return verify


def _install(npm: str, folder: Path) -> None:
    (folder / "package.json").write_text('{"private": true}')
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=20000"]
    environment = os.environ | {"npm_config_update_notifier": "false"}
    try:
        subprocess.run(
            [npm, "install", "jose@6", *options],
            cwd=folder,
            env=environment,
            capture_output=True,
            check=True,
            timeout=90,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip("npm cannot fetch `jose` from its registry here")


def test_jose_accepts_our_signatures(jose: Callable[[list[SignedMessage]], list[dict[str, Any]]]) -> None:
    device = MessageSender(key=KEY)
    sent = [
        device.results(),
        device.drift(),
        device.alert(summary="Grüße; ax: gain loss."),
        device.health(),
        device.state(),
    ]
    for message, verdict in zip(sent, jose(sent), strict=True):
        payload = base64.b64encode(message.payload).decode()
        assert (verdict["flattened"], verdict["general"], verdict["middle"]) == (payload, payload, "")
        assert verdict["header"] == {
            "alg": "EdDSA",
            "b64": False,
            "crit": ["b64"],
            "kid": KEY.public.kid,
            "top": message.topic,
        }


def test_jose_rejects_altered_messages(jose: Callable[[list[SignedMessage]], list[dict[str, Any]]]) -> None:
    device = MessageSender(key=KEY)
    first, second = device.health(), device.health()
    head, _, signature = first.jws.split(".")
    foreign = MessageSender(key=new_key(2)).health()
    tampered = [
        replace(first, payload=first.payload.replace(b"pi-07", b"pi-08")),
        replace(first, payload=first.payload + b" "),
        replace(first, jws=second.jws),
        replace(first, jws=f"{head}..{signature[:-4]}AAAA"),
        replace(first, jws=f"{foreign.jws.split('.')[0]}..{signature}"),
        foreign,
    ]
    verdicts = jose(tampered)
    assert [v["flattened"] for v in verdicts] == [REFUSED] * len(tampered)
    assert [v["general"] for v in verdicts] == [REFUSED] * len(tampered)
