"""What ships with the agent: bundles, recordings and the key that signed them."""

from __future__ import annotations

from pathlib import Path

from agent.errors import BadBundle
from agent.wire.keys import PublicKey, parse_public_key

_INSTALLED_DIR = Path(__file__).parents[2] / "shipped"
_CHECKOUT_DIR = Path(__file__).parents[3] / "models"


def bundles_dir() -> Path:
    """The folder of shipped bundles."""
    return _INSTALLED_DIR / "bundles" if _INSTALLED_DIR.exists() else _CHECKOUT_DIR


def locate_bundle(name: str, local_dir: Path) -> Path:
    """The folder or archive of a bundle: a path, one in `<data_dir>/bundles/`, or one that ships with the agent.

    Raises BadBundle.
    """
    if "/" in name:
        return Path(name)
    for candidate in (local_dir / name, local_dir / f"{name}.zip", bundles_dir() / name):
        if candidate.exists():
            return candidate
    raise BadBundle(f"no bundle {name!r} in {local_dir} nor among those shipped; put it there, or give its path")


def resolve_path(path: Path) -> Path:
    """`path`, or where nothing is there the shipped bundle of that name."""
    ours = bundles_dir() / path.name
    return ours if len(path.parts) == 1 and not path.exists() and (ours / "manifest.json").exists() else path


def recordings_dir() -> Path:
    """The folder of held-out recordings that simulated devices replay."""
    return _INSTALLED_DIR / "recordings" if _INSTALLED_DIR.exists() else _CHECKOUT_DIR / "recordings"


def publisher_keys() -> list[PublicKey]:
    """The key that signs shipped bundles."""
    path = (_INSTALLED_DIR if _INSTALLED_DIR.exists() else _CHECKOUT_DIR) / "publisher.pub"
    return [parse_public_key(path.read_text(encoding="ascii"))] if path.exists() else []
