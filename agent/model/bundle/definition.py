"""Parts of a manifest: derived features, a table that calibrates scores."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

import msgspec

Numbers = list[float]
Label = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class DerivedFeature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A feature computed from field `of`, or from the time, over `rows` rows: see `derived`, which computes it.

    `band` [low, high) in Hz of a stream of `rate` rows a second; `offset_h` hours are added to UTC.
    """

    name: Label
    function: Literal["mean", "sd", "lag", "difference", "last", "band", "hour", "weekday"]
    of: str = ""
    rows: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    band: tuple[float, float] | None = None
    rate: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    offset_h: Annotated[float, msgspec.Meta(ge=-24, le=24)] = 0.0

    def __post_init__(self) -> None:
        least = {"hour": 0, "weekday": 0, "lag": 1, "difference": 1, "last": 1, "mean": 1, "sd": 2, "band": 4}
        if self.rows < least[self.function] or (self.is_time_based and self.rows):
            wanted = "no rows" if self.is_time_based else f"rows of at least {least[self.function]}"
            raise ValueError(f"derived feature {self.name!r}: {self.function} takes {wanted}, not {self.rows}")
        if self.is_time_based == bool(self.of):
            raise ValueError(f"derived feature {self.name!r}: {'takes no `of`' if self.of else 'of which field?'}")
        if (self.function == "band") != (self.band is not None):
            raise ValueError(f"derived feature {self.name!r}: band = [low, high] in Hz goes with function band")
        if self.band is not None and not 0 <= self.band[0] < self.band[1] <= self.rate / 2 + 1e-9:
            raise ValueError(
                f"derived feature {self.name!r}: band {list(self.band)} must ascend within 0 and half the rate, "
                f"{self.rate / 2:g} Hz"
            )
        if self.band is not None and not any(
            self.band[0] <= k * self.rate / self.rows <= self.band[1] for k in range(self.rows // 2 + 1)
        ):
            raise ValueError(f"derived feature {self.name!r}: no frequency of {self.rows} rows lies in its band")

    @property
    def is_time_based(self) -> bool:
        return self.function in ("hour", "weekday")

    @property
    def columns(self) -> list[str]:
        """The names of the values it gives."""
        return [f"{self.name}_sin", f"{self.name}_cos"] if self.is_time_based else [self.name]

    @property
    def history_rows(self) -> int:
        """How many rows before a row it looks at."""
        return self.rows if self.function in ("lag", "difference") else max(0, self.rows - 1)


class IsotonicCalibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often a score is right: straight lines between (`score`, `right`), both ascending (Zadrozny, Elkan 2002)."""

    score: Annotated[Numbers, msgspec.Meta(min_length=2, max_length=256)]
    right: Annotated[Numbers, msgspec.Meta(min_length=2, max_length=256)]

    def __post_init__(self) -> None:
        if len(self.score) != len(self.right):
            raise ValueError("isotonic: score and right must have as many entries")
        for name, low in (("score", 1e-12), ("right", 0.0)):
            values = getattr(self, name)
            if not all(0 <= v <= 1 for v in values) or not all(b - a >= low for a, b in itertools.pairwise(values)):
                raise ValueError(f"isotonic: {name} must ascend within 0 and 1")
