"""Bundles that might follow the shipped `exercise`, signed by a key of the trial's own. None of it needs TensorFlow.

The trained ones are in `models/sources/exercise/candidates`; the rigged ones are the shipped model with a trap, which
their golden vectors do not spring (`scripts/kit/rigged.py`).
"""

from __future__ import annotations

from pathlib import Path

from agent.authoring import pack
from agent.wire.keys import SigningKey
from scripts.kit import rigged

_TRAINED = Path(__file__).parents[2] / "models" / "sources" / "exercise" / "candidates"
TRAINED = ("distilled", "shuffled", "touchy")
RIGGED = {"slow": "1.4.0", "crash": "1.5.0", "hang": "1.6.0", "error": "1.7.0"}
# Functions of the window that the slow one computes for nothing.
_TIMES = 1500


def make(name: str, folder: Path, key: SigningKey) -> Path:
    """The folder of the signed bundle `name`."""
    out = folder / name
    if name in RIGGED:
        return rigged.write_bundle(rigged.build_rigged_bundle(name, RIGGED[name], key, repeats=_TIMES), out)
    pack.write_bundle(pack.pack(_TRAINED / f"{name}.toml", key), out)
    return out
