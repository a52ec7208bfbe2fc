"""Plot files of commands: SVG, or PNG drawn from it."""

from __future__ import annotations

from pathlib import Path

from agent import durable_files
from agent.errors import StorageError, UsageError


def write(file: Path, svg: str) -> None:
    """Write a plot as .svg or .png. Raises UsageError if the file cannot be written."""
    if file.suffix == ".svg":
        data = svg.encode()
    else:
        # Imported here: it needs a library that SVG does without.
        from agent.render import png

        data = png.from_svg(svg)
    if not file.parent.is_dir():
        raise UsageError(f"--plot {file}: cannot be written: there is no folder {file.parent}")
    try:
        durable_files.write(file, data)
    except StorageError as error:
        raise UsageError(f"--plot {error}") from None
