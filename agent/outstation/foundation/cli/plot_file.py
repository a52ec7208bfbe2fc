"""Plot files of commands: SVG, or PNG drawn from it."""

from __future__ import annotations

from pathlib import Path

from outstation.foundation import durable_files
from outstation.foundation.errors import StorageError, UsageError
from outstation.foundation.extras import install_command

SCALE = 2
_FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")


def write(file: Path, svg: str) -> None:
    """Write a plot as .svg or .png. Raises UsageError if the file cannot be written."""
    data = svg.encode() if file.suffix == ".svg" else to_png(svg)
    if not file.parent.is_dir():
        raise UsageError(f"--plot {file}: cannot be written: there is no folder {file.parent}")
    try:
        durable_files.write(file, data)
    except StorageError as error:
        raise UsageError(f"--plot {error}") from None


def to_png(svg: str) -> bytes:
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
