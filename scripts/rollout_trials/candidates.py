"""Candidate bundles to follow the shipped `exercise`, signed by a key of the trial. They need no TensorFlow.

The trained ones are in `models/sources/exercise/candidates`. The rigged ones are the shipped model with a trap that
their golden vectors do not trigger (`scripts/kit/rigged.py`).
"""

from __future__ import annotations

from pathlib import Path

from agent.authoring import pack
from agent.wire.keys import SigningKey
from scripts.kit import rigged

_TRAINED = Path(__file__).parents[2] / "models" / "sources" / "exercise" / "candidates"
TRAINED = ("distilled", "shuffled", "touchy")
RIGGED = {"slow": "1.4.0", "crash": "1.5.0", "hang": "1.6.0", "error": "1.7.0"}
# Functions of the window that the slow model computes in vain.
_TIMES = 1500


def make(name: str, folder: Path, key: SigningKey) -> Path:
    """Create the signed bundle `name` and return its folder."""
    out = folder / name
    if name in RIGGED:
        return rigged.write_bundle(rigged.build_rigged_bundle(name, RIGGED[name], key, repeats=_TIMES), out)
    pack.write_bundle(pack.pack(_TRAINED / f"{name}.toml", key), out)
    return out
