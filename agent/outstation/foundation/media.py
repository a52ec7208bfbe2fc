"""Image and sound formats: how media become rows, in bundle inputs and in file sources alike."""

import json
import math
from typing import Annotated, Any, Literal

import msgspec


class ImageFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Image as `height` rows of `width` · `channels` values: pixel (0 to 255) · scale + offset."""

    width: Annotated[int, msgspec.Meta(ge=1, le=2048)]
    height: Annotated[int, msgspec.Meta(ge=1, le=2048)]
    channels: Literal[1, 3] = 3
    scale: float = 1 / 255
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and math.isfinite(self.offset)):
            raise ValueError(f"image: scale {self.scale:g} and offset {self.offset:g} must be finite")

    @property
    def columns(self) -> list[str]:
        return [f"pixel{i}" for i in range(self.width * self.channels)]

    @property
    def max_row_gap_s(self) -> float:
        """Longest gap within an image: its rows have one time, so any step is to another image."""
        return 1e-7


class SoundFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Sound as a row for each `hop` samples, at `rate` samples a second.

    A row has `mels` bands of a `window` of samples, or `cepstra` coefficients of them. Bands lie between `low` and
    `high` Hz (half the rate) and are sums of |spectrum|^`power`; their logarithm, in decibels or natural, is of values
    above `floor`.
    """

    rate: Annotated[int, msgspec.Meta(ge=100, le=400_000)]
    window: Annotated[int, msgspec.Meta(ge=8, le=65_536)]
    hop: Annotated[int, msgspec.Meta(ge=1, le=65_536)]
    mels: Annotated[int, msgspec.Meta(ge=1, le=512)]
    low: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    high: float | None = None
    scale: Literal["slaney", "htk"] = "slaney"
    power: Literal[1, 2] = 2
    decibels: bool = True
    floor: Annotated[float, msgspec.Meta(gt=0)] = 2.220446049250313e-16
    cepstra: Annotated[int, msgspec.Meta(ge=0, le=512)] = 0

    def __post_init__(self) -> None:
        high = self.rate / 2 if self.high is None else self.high
        if not self.low < high <= self.rate / 2:
            raise ValueError(f"sound: low {self.low:g} and high {high:g} Hz must ascend within half the rate")
        if self.cepstra > self.mels:
            raise ValueError(f"sound: {self.cepstra} cepstra of {self.mels} mels; give at most as many")

    @property
    def fft_size(self) -> int:
        """Points of the Fourier transform: the next power of two."""
        return 1 << (self.window - 1).bit_length()

    @property
    def row_period_s(self) -> float:
        return self.hop / self.rate

    @property
    def max_row_gap_s(self) -> float:
        """Longest gap within a sound; between two sounds there is a longer one."""
        return 1.5 * self.row_period_s

    @property
    def columns(self) -> list[str]:
        return [f"cepstrum{i}" for i in range(self.cepstra)] or [f"mel{i}" for i in range(self.mels)]


MediaFormat = ImageFormat | SoundFormat


def to_toml(media_format: MediaFormat) -> str:
    """Format as a TOML line: `image = { width = 96, height = 96 }`."""
    settings: dict[str, Any] = msgspec.to_builtins(media_format)
    members = ", ".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
    return f"{'image' if isinstance(media_format, ImageFormat) else 'sound'} = {{ {members} }}"
