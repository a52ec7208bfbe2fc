"""Gate: a detector that keeps drift windows out of all other tests and out of learning, such as the sampling rate."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from outstation.foundation.arrays import Float64s, Ints
from outstation.ml.drift.detectors.detector import Baseline, Detector
from outstation.protocol.alerts.alert import Alert, AlertKind


class GateWindows(msgspec.Struct, frozen=True):
    """W drift windows that a gate observes."""

    counts: Mapping[str, Ints]  # (W, C, …) by detector
    step_us: Float64s  # (W,) mean step from row to row, NaN if unknown
    repeated: Float64s  # (W,) share of rows that repeat the row before
    t: Ints  # (W,) middle of each, epoch µs


class GateObservation(Protocol):
    """Observation of one drift window, whatever was before it."""

    @property
    def fault(self) -> str:
        """Name of the window's fault, or ""."""


class GateState(Protocol):
    """State of a gate after a drift window."""

    @property
    def blocks_window(self) -> bool:
        """True if that window is kept out of all other tests, and out of learning."""

    @property
    def is_open(self) -> bool:
        """True while an alert is open."""

    @property
    def drifting(self) -> bool:
        """True while a drift alert is open: what was gathered towards other drift alerts is dropped."""


class GateRun(Protocol):
    """Run of a gate over W windows."""

    @property
    def windows_before_block(self) -> int: ...

    def state_after(self, windows: int) -> Any:
        """Return the gate's state after `windows` windows."""

    def nearest_shares(self, windows: int) -> Float64s | None:
        """Return the largest sum after each of `windows` windows as a share of its limit; None if the gate waits."""


class GateDetector(Detector):
    """Detector that keeps windows out of all other tests and out of learning, and raises alerts of its own.

    A site's `baseline` is None until the site has a reference.
    """

    state_type: Any  # frozen struct, a `GateState`
    member: str  # name of its part of a drift message

    @abstractmethod
    def start(self) -> Any: ...

    @abstractmethod
    def restart(self, state: Any) -> Any:
        """Close all alerts but keep their count: the site's reference is learned anew."""

    @abstractmethod
    def observe(self, windows: GateWindows, baseline: Baseline | None) -> Sequence[GateObservation]: ...

    @abstractmethod
    def run(
        self, state: Any, observations: Sequence[Any], baseline: Baseline, t: Ints, *, fields_drift: bool, to_clear: int
    ) -> GateRun:
        """Run over W windows that began at `t` (W,) epoch µs.

        W is 1 while an alert is open or the window has a fault. `fields_drift` says that a drift alert of a field is
        open before them. `to_clear` windows in a row without evidence clear an alert.
        """

    @abstractmethod
    def build_alerts(
        self,
        previous: Any,
        current: Any,
        observation: Any,
        baseline: Baseline,
        t: tuple[int, int],
        evidence: dict[str, Any],
    ) -> list[Alert]:
        """Build the alerts that a window at `t` raises and clears; `evidence` locates it."""

    @abstractmethod
    def list_open(self, state: Any) -> list[tuple[AlertKind, int]]:
        """Return kind and number of each open alert."""

    @abstractmethod
    def continue_numbers(self, state: Any, other: Any) -> Any:
        """Return `state` with alert numbers above those of `other`."""

    def clear_alerts(self, state: Any, reason: str, evidence: dict[str, Any]) -> list[Alert]:
        """Clear the open alerts, as the reference they were raised against is gone."""
        return [
            kind.cleared(f"{kind.subject}: {reason}.", evidence, count=number) for kind, number in self.list_open(state)
        ]

    @abstractmethod
    def build_member(self, state: Any, step_us: float, repeated: float, baseline: Baseline | None) -> dict[str, Any]:
        """Build its part of a drift message, with a `state` as fields have one.

        `state` is the state after the message's last window; `step_us` is the mean interval over all its windows, NaN
        if unknown, `repeated` a share of their rows.
        """
