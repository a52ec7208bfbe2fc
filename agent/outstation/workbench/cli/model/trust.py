"""Signature status of a bundle, for commands that accept any bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from outstation.foundation.errors import BadBundle
from outstation.protocol.wire.keys import PublicKey

if TYPE_CHECKING:
    from outstation.ml.model.bundle.bundle import Bundle


UNVERIFIED = "claims"


def check_signature(path: Path, loaded_bundle: Bundle, trusted: list[PublicKey] | None) -> tuple[bool, str]:
    """Return (ok, sentence) on the signature: verified with the given keys, else with the built-in key.

    The sentence of a signature that no key here can verify begins with `UNVERIFIED`.
    """
    from outstation.ml.model.bundle import builtin
    from outstation.ml.model.bundle import bundle as bundles

    own = builtin.publisher_keys()
    if not loaded_bundle.signer:
        damaged = "manifest.jws" in loaded_bundle.files
        return False, f"{'manifest.jws is none' if damaged else 'not signed'}; sign it with `outstation model sign`"
    if trusted is not None:
        return True, f"by {loaded_bundle.signer}"
    if loaded_bundle.signer not in {key.kid for key in own}:
        return (
            True,
            f"{UNVERIFIED} {loaded_bundle.signer}, not verified: give the publisher's public key with --publisher",
        )
    try:
        return True, f"by {bundles.read(path, own).signer}"
    except BadBundle as problem:
        return False, str(problem)
