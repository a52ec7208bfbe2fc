"""Signing and verification of a result message, against PyJWT with the same key, header and bytes."""

from __future__ import annotations

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.api_jws import PyJWS

from agent.wire import jws
from agent.wire.keys import SigningKey
from scripts.benchmarks import Result, benchmark, rates

TOPIC = "outstation/acme/pi-07/results/exercise"
MESSAGES = 1000


@benchmark("signing", quick=True)
def signing() -> Result:
    """Sign and verify each message once, as on its way from a device to a collector."""
    key = SigningKey(Ed25519PrivateKey.generate())
    signer = jws.Signer("pi-07", key.public)
    payloads = [message(seq) for seq in range(1, MESSAGES + 1)]
    other = PyJWS()
    header = {"typ": None, "b64": False, "crit": ["b64"], "kid": key.public.kid, "top": TOPIC}

    def ours() -> int:
        for payload in payloads:
            jws.verify([jws.sign(key, TOPIC, payload)], TOPIC, payload, {key.public.kid: signer}.get)
        return MESSAGES

    def reference() -> int:
        for payload in payloads:
            token = other.encode(payload, key.private, "EdDSA", header)
            other.decode(token, key.private.public_key(), ["EdDSA"], detached_payload=payload)
        return MESSAGES

    note = f"sign and verify {len(payloads[0])} bytes; reference: PyJWT"
    return Result("signing", *rates(ours, reference), "messages/s", 1.0, note)


def message(seq: int) -> bytes:
    """Build a result message of forty windows."""
    columns = {"row": list(range(100, 4100, 100)), "label": ["PEN"] * 40, "score": [0.97] * 40}
    return msgspec.json.encode({"v": 1, "kind": "results", "device": "pi-07", "seq": seq, "columns": columns})
