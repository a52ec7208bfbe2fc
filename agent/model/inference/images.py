"""Images as rows: a row of pixels is a row of values, and an image a model window. The only importer of Pillow."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from agent.arrays import Float32s
from agent.errors import UsageError
from agent.media import ImageFormat

PILLOW_MISSING = "images need Pillow: pip install 'outstation[images]'"
SUFFIXES = (".jpg", ".jpeg", ".png")
# A small file may decode to any size; a larger file is not a plausible image.
_MAX_PIXELS = 50_000_000
_MAX_BYTES = 64 << 20


def read_rows(path: Path, spec: ImageFormat) -> Float32s:
    """Read a JPEG or PNG as (height, width · channels): rotated by EXIF, resized, scaled. Raises UsageError."""
    try:
        from PIL import Image as pillow
        from PIL import ImageOps
    except ImportError:
        raise UsageError(f"{path}: {PILLOW_MISSING}") from None
    # Pillow's own limit only warns, below ours.
    pillow.MAX_IMAGE_PIXELS = None
    try:
        if (length := path.stat().st_size) > _MAX_BYTES:
            raise UsageError(f"{path}: {length:,} bytes, {_MAX_BYTES:,} at most; make it smaller")
        with pillow.open(path, formats=("JPEG", "PNG")) as source:
            if source.width * source.height > _MAX_PIXELS:
                raise UsageError(
                    f"{path}: {source.width} x {source.height} pixels, {_MAX_PIXELS:,} at most; make it smaller"
                )
            mode, size = "RGB" if spec.channels == 3 else "L", (spec.width, spec.height)
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


def is_pillow_installed() -> bool:
    """Return True if Pillow is installed, without loading it."""
    return find_spec("PIL") is not None
