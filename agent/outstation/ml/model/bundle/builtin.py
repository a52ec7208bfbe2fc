"""Built-in bundles: bundles and recordings that ship with the agent, and the key that signed them."""

from __future__ import annotations

from pathlib import Path

from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import UnknownBundle
from outstation.protocol.wire.keys import PublicKey, parse_public_key

_INSTALLED_DIR = Path(__file__).parents[3] / "shipped"
_CHECKOUT_DIR = Path(__file__).parents[5] / "models"


def bundles_dir() -> Path:
    return _INSTALLED_DIR / "bundles" if _INSTALLED_DIR.exists() else _CHECKOUT_DIR


def locate_bundle(name: str, local_dir: Path) -> Path:
    """Locate a bundle: a path, a name in `<data_dir>/bundles/`, or a built-in bundle. Raises UnknownBundle."""
    if "/" in name:
        return Path(name)
    for candidate in (local_dir / name, local_dir / f"{name}.zip", bundles_dir() / name):
        if candidate.exists():
            return candidate
    fix = f"put it there, or give its path{suggest_name(name)}"
    raise UnknownBundle(f"no bundle {name!r} in {local_dir} or among the built-in ones; {fix}")


def suggest_name(name: str) -> str:
    """Return a hint at the built-in bundles, for a bundle that does not exist."""
    return did_you_mean(name, [path.parent.name for path in bundles_dir().glob("*/manifest.json")])


def read_smallest_model() -> bytes:
    """Return the smallest built-in model, or b"" if there is none."""
    models = sorted(bundles_dir().glob("*/model.tflite"), key=lambda path: path.stat().st_size)
    return models[0].read_bytes() if models else b""


def resolve_path(path: Path) -> Path:
    """Return `path`, or the built-in bundle of that name if nothing is there."""
    shipped = bundles_dir() / path.name
    is_builtin = len(path.parts) == 1 and not path.exists() and (shipped / "manifest.json").exists()
    return shipped if is_builtin else path


def recordings_dir() -> Path:
    """Return the folder of held-out recordings that simulated devices replay."""
    return _INSTALLED_DIR / "recordings" if _INSTALLED_DIR.exists() else _CHECKOUT_DIR / "recordings"


def publisher_keys() -> list[PublicKey]:
    path = (_INSTALLED_DIR if _INSTALLED_DIR.exists() else _CHECKOUT_DIR) / "publisher.pub"
    return [parse_public_key(path.read_text(encoding="utf-8"))] if path.exists() else []
