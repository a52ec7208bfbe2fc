"""What ships with the agent: bundles, recordings and the key that signed them."""

from __future__ import annotations

from pathlib import Path

from agent.errors import BadBundle
from agent.wire.keys import PublicKey, public_key

_INSTALLED = Path(__file__).parents[2] / "shipped"
_CHECKOUT = Path(__file__).parents[3] / "models"


def bundles() -> Path:
    """The folder of shipped bundles."""
    return _INSTALLED / "bundles" if _INSTALLED.exists() else _CHECKOUT


def locate(name: str, store: Path) -> Path:
    """The folder or archive of a bundle: a path, one in `<data_dir>/bundles/`, or one that ships with the agent.

    Raises BadBundle.
    """
    if "/" in name:
        return Path(name)
    for candidate in (store / name, store / f"{name}.zip", bundles() / name):
        if candidate.exists():
            return candidate
    raise BadBundle(f"no bundle {name!r} in {store} nor among those shipped; put it there, or give its path")


def or_shipped(path: Path) -> Path:
    """`path`, or where nothing is there the shipped bundle of that name."""
    ours = bundles() / path.name
    return ours if len(path.parts) == 1 and not path.exists() and (ours / "manifest.json").exists() else path


def recordings() -> Path:
    """The folder of held-out recordings that simulated devices replay."""
    return _INSTALLED / "recordings" if _INSTALLED.exists() else _CHECKOUT / "recordings"


def publishers() -> list[PublicKey]:
    """The key that signs shipped bundles."""
    path = (_INSTALLED if _INSTALLED.exists() else _CHECKOUT) / "publisher.pub"
    return [public_key(path.read_text(encoding="ascii"))] if path.exists() else []
