"""Images as rows: each row of pixels is a row of values, so that an image is a model window. Alone knows Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.errors import UsageError
from agent.model.definition import Image

Floats = NDArray[np.float32]
SUFFIXES = (".jpg", ".jpeg", ".png")
# A small file may unpack to any size.
_MOST_PIXELS = 50_000_000


def rows(path: Path, spec: Image) -> Floats:
    """(height, width · channels), turned as the camera says, resized whole (bilinear), scaled.

    Raises UsageError where it is no JPEG or PNG.
    """
    try:
        from PIL import Image as pillow
        from PIL import ImageOps
    except ImportError:
        raise UsageError(f"{path}: images need Pillow: pip install 'outstation[images]'") from None
    try:
        with pillow.open(path, formats=("JPEG", "PNG")) as found:
            if found.width * found.height > _MOST_PIXELS:
                raise UsageError(
                    f"{path}: {found.width} x {found.height} pixels, {_MOST_PIXELS:,} at most; make it smaller"
                )
            turned = ImageOps.exif_transpose(found).convert("RGB" if spec.channels == 3 else "L")
            pixels = np.asarray(turned.resize((spec.width, spec.height), pillow.Resampling.BILINEAR), np.float32)
    except pillow.UnidentifiedImageError:
        raise UsageError(f"{path}: no JPEG or PNG image; take it away, or give it as one of these") from None
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise UsageError(f"{path}: an image that cannot be read: {getattr(error, 'strerror', None) or error}") from None
    scaled: Floats = pixels.reshape(spec.height, -1) * np.float32(spec.scale) + np.float32(spec.offset)
    return scaled
