"""Settings of a drift monitor: what a task's config and bundle say of it, and the reference that it begins with."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from outstation.foundation.errors import BadBundle
from outstation.ml.drift.baseline.reference import MIN_WINDOWS, Reference
from outstation.ml.drift.outputs.counts import FurtherOutput


class MonitorSettings(msgspec.Struct, frozen=True):
    """Settings of a drift monitor, checked. Raises BadBundle, and ValueError for too few `learn_windows`.

    `own` is the bundle's reference. `basis` is used in its place, where it is merged with that of the bundle before.
    The site's reference is learned from `learn_windows` drift windows and at least `min_learn_s` seconds of readings.
    Where these windows are too much like their neighbors, learning takes up to `learn_extension` times as long.
    `seasonality` says whether it follows the hour of day and days of rest (auto, hour, week, none). `class_field` names
    the field whose values are the classes of a model that names none; `further` are the outputs beside the main one.
    With `hold_deviating`, a reference that deviates is not used before an operator accepts it.
    """

    own: Reference
    labels: Sequence[str]
    window: int
    learn_windows: int = 40
    units: Sequence[str] = ()
    roles: Sequence[str] = ()
    min_learn_s: float = 0.0
    learn_extension: float = 4.0
    seasonality: str = "auto"
    class_field: str = ""
    hold_deviating: bool = False
    further: Sequence[FurtherOutput] = ()
    basis: Reference | None = None

    def __post_init__(self) -> None:
        shipped = self.shipped
        if tuple(self.labels) != shipped.labels:
            raise BadBundle("the drift reference has other labels than the model: build reference.json for this model")
        if shipped.further and [reference.output for reference in shipped.further] != list(self.further):
            raise BadBundle("the drift reference has other further outputs than the model: build reference.json for it")
        if self.learn_windows < MIN_WINDOWS:
            raise ValueError(
                f"a site cannot learn its reference from {self.learn_windows} drift windows; {MIN_WINDOWS} is the least"
            )
        if self.class_field and shipped.labels:
            raise BadBundle(f"the model names classes itself: {self.class_field!r} cannot name them, too")

    @property
    def shipped(self) -> Reference:
        """The reference that the monitor begins with."""
        return self.own if self.basis is None else self.basis
