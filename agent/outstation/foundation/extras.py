"""Optional dependencies (extras), and the command that adds one to this installation."""

from __future__ import annotations

import os
import sys

# Environment of the Debian packages. That of deploy/install.sh lists its extras in a file.
_PACKAGED, _LIST = "/opt/outstation", ".extras"
_PACKAGES = {
    **dict.fromkeys(("fleet", "plot", "postgres"), "outstation-fleet"),
    **dict.fromkeys(("parquet", "sql"), "outstation-extras"),
}
# Extras that include others.
_UNIONS = ("demo", "dev")


def install_command(extra: str) -> str:
    """Return the command that adds an extra here: with deploy/install.sh, Debian's packages or pip."""
    try:
        with open(os.path.join(sys.prefix, _LIST), encoding="utf-8") as file:
            present = [name for name in file.read().strip().split(",") if name]
        return f"sudo deploy/install.sh --extras {','.join([*present, extra])}"
    except OSError:
        pass
    if sys.prefix != _PACKAGED:
        return f"pip install 'outstation[{extra}]'"
    if package := _PACKAGES.get(extra):
        return f"sudo apt-get install {package}"
    return f"no package has it; python3 -m venv VENV && VENV/bin/pip install 'outstation[{extra}]'"


def find_extra(module: str) -> str | None:
    """Return the extra whose packages include a module, by the metadata of this installation."""
    import re
    from importlib import metadata

    try:
        requirements = metadata.requires("outstation") or []
    except metadata.PackageNotFoundError:
        return None
    name = re.escape(module.replace("_", "-"))
    for requirement in requirements:
        extra = re.search(r"""\bextra == ["']([a-z]+)["']""", requirement)
        if extra and extra[1] not in _UNIONS and re.match(rf"{name}(?![\w-])", requirement, re.IGNORECASE):
            return extra[1]
    return None
