"""Images as rows: a row of pixels is a row of values, and an image a model window. The only importer of Pillow."""

from __future__ import annotations

import contextlib
import io
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from outstation.foundation import input_files
from outstation.foundation.arrays import Float32s
from outstation.foundation.errors import UsageError
from outstation.foundation.extras import install_command
from outstation.foundation.media import ImageFormat

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png")
# A small file may decode to any size; a larger file is not a plausible image.
_MAX_PIXELS = 50_000_000
_MAX_BYTES = 64 << 20
# Pillow's bytes of a pixel, and libjpeg's of one of a progressive JPEG, whose coefficients it holds.
_PIXEL_BYTES, _COEFFICIENT_BYTES = 4, 6
_EXIF_ORIENTATION = 0x0112


def describe_missing_pillow() -> str:
    return f"images need Pillow: {install_command('images')}"


def read_rows(path: Path, spec: ImageFormat, file: BinaryIO | None = None, memory_bytes: int | None = None) -> Float32s:
    """Read a JPEG or PNG as (height, width · channels): rotated by EXIF, resized, scaled. Raises UsageError.

    `file` is the open file, if it must not be opened again. An image whose pixels need more than `memory_bytes` is
    rejected by its header.
    """
    try:
        from PIL import Image as pillow
        from PIL import ImageOps
    except ImportError:
        raise UsageError(f"{path}: {describe_missing_pillow()}") from None
    # Pillow's own limit only warns, below ours.
    pillow.MAX_IMAGE_PIXELS = None
    try:
        with contextlib.nullcontext(file) if file is not None else input_files.open_regular(path) as opened:
            length = opened.seek(0, os.SEEK_END)
            opened.seek(0)
            if length > _MAX_BYTES:
                raise UsageError(f"{path}: {length:,} bytes, {_MAX_BYTES:,} at most; make it smaller")
            with pillow.open(opened, formats=("JPEG", "PNG")) as source:
                mode, size = "RGB" if spec.channels == 3 else "L", (spec.width, spec.height)
                _check_size(path, source, mode, memory_bytes)
                # Skip steps that would only copy.
                ImageOps.exif_transpose(source, in_place=True)
                image: pillow.Image = source if source.mode == mode else source.convert(mode)
                pixels = np.asarray(
                    image if image.size == size else image.resize(size, pillow.Resampling.BILINEAR), np.float32
                )
    except pillow.UnidentifiedImageError:
        raise UsageError(f"{path}: not a JPEG or PNG image; remove it, or convert it to one of these") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path}: the image cannot be read: {getattr(error, 'strerror', None) or error}") from None
    pixels *= np.float32(spec.scale)
    pixels += np.float32(spec.offset)
    return pixels.reshape(spec.height, -1)


def _check_size(path: Path, source: Image, mode: str, memory_bytes: int | None) -> None:
    """Raise UsageError if the pixels that the header declares are too many, or need too much memory."""
    count = source.width * source.height
    if count > _MAX_PIXELS:
        raise UsageError(f"{path}: {source.width} x {source.height} pixels, {_MAX_PIXELS:,} at most; make it smaller")
    # The orientation of a PNG may follow its pixels.
    rotates = source.format == "PNG" or source.getexif().get(_EXIF_ORIENTATION, 1) != 1
    copies = 1 + (source.mode != mode) + rotates
    needed = count * (_PIXEL_BYTES * copies + _COEFFICIENT_BYTES * ("progressive" in source.info))
    if memory_bytes is not None and needed > memory_bytes:
        raise UsageError(
            f"{path}: {source.width} x {source.height} pixels need {needed >> 20:,} MiB of memory, "
            f"{memory_bytes >> 20:,} MiB are left for them; make it smaller"
        )


def make_samples() -> dict[str, bytes]:
    """Return name → content of a small image of each format: to read them imports all that Pillow needs."""
    from PIL import Image as pillow
    from PIL import MpoImagePlugin, TiffImagePlugin  # noqa: F401

    samples = {}
    for suffix, kind in ((".jpg", "JPEG"), (".png", "PNG")):
        out = io.BytesIO()
        image = pillow.new("RGBA" if kind == "PNG" else "L", (2, 2))
        exif = pillow.Exif()
        exif[_EXIF_ORIENTATION] = 6
        image.save(out, kind, exif=exif)
        samples[f"a{suffix}"] = out.getvalue()
    return samples


def is_pillow_installed() -> bool:
    """Return True if Pillow is installed, without loading it."""
    return find_spec("PIL") is not None
