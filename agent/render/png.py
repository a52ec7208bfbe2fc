"""Conversion of SVG to PNG, with an optional library."""

from __future__ import annotations

from pathlib import Path

from agent.errors import UsageError
from agent.extras import install_command

SCALE = 2
_FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")


def from_svg(svg: str) -> bytes:
    """Return PNG bytes. Raises UsageError without the library or any font."""
    try:
        import resvg_py
    except ImportError:
        raise UsageError(
            f"PNG needs a library: {install_command('plot')}; or name a file that ends in .svg, which needs none"
        ) from None
    if not any(True for folder in _FONT_FOLDERS for _ in Path(folder).expanduser().rglob("*.[ot]t[fc]")):
        # The library would silently omit all text.
        raise UsageError("PNG needs a font: apt-get install fonts-dejavu-core; or name a file that ends in .svg")
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=SCALE))
