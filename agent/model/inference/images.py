"""Images as rows: each row of pixels is a row of values, so that an image is a model window. Alone knows Pillow."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.errors import UsageError
from agent.media import ImageFormat

Floats = NDArray[np.float32]
PILLOW_MISSING = "images need Pillow: pip install 'outstation[images]'"
SUFFIXES = (".jpg", ".jpeg", ".png")
# A small file may unpack to any size, and a large one is no picture.
_MAX_PIXELS = 50_000_000
_MAX_BYTES = 64 << 20


def read_rows(path: Path, spec: ImageFormat) -> Floats:
    """(height, width · channels), turned as the camera says, resized whole (bilinear), scaled.

    Raises UsageError where it is no JPEG or PNG, or one too large to be decoded.
    """
    try:
        from PIL import Image as pillow
        from PIL import ImageOps
    except ImportError:
        raise UsageError(f"{path}: {PILLOW_MISSING}") from None
    # Its own limits would be a warning below ours.
    pillow.MAX_IMAGE_PIXELS = None
    try:
        if (length := path.stat().st_size) > _MAX_BYTES:
            raise UsageError(f"{path}: {length:,} bytes, {_MAX_BYTES:,} at most; make it smaller")
        with pillow.open(path, formats=("JPEG", "PNG")) as found:
            if found.width * found.height > _MAX_PIXELS:
                raise UsageError(
                    f"{path}: {found.width} x {found.height} pixels, {_MAX_PIXELS:,} at most; make it smaller"
                )
            mode, size = "RGB" if spec.channels == 3 else "L", (spec.width, spec.height)
            # Each step would copy what is as it should be, too.
            ImageOps.exif_transpose(found, in_place=True)
            image: pillow.Image = found if found.mode == mode else found.convert(mode)
            pixels = np.asarray(
                image if image.size == size else image.resize(size, pillow.Resampling.BILINEAR), np.float32
            )
    except pillow.UnidentifiedImageError:
        raise UsageError(f"{path}: no JPEG or PNG image; take it away, or give it as one of these") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path}: an image that cannot be read: {getattr(error, 'strerror', None) or error}") from None
    pixels *= np.float32(spec.scale)
    pixels += np.float32(spec.offset)
    return pixels.reshape(spec.height, -1)


def is_pillow_installed() -> bool:
    """Whether Pillow is installed; it is not loaded."""
    return find_spec("PIL") is not None
