"""Drift window results: the members of each message, and runs of quiet windows, which share one message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.detectors.registry import GATES, GateStates
from outstation.ml.drift.reporting import drift_message
from outstation.ml.drift.reporting.drift_message import MessageSums, SuiteStatus
from outstation.ml.drift.sequential.test_suite import DriftTester
from outstation.ml.drift.state import DriftWindowResult
from outstation.protocol.wire.runs import MAX_QUIET_WINDOWS


class ClosedWindow(msgspec.Struct, frozen=True, eq=False):
    """A closed window, or a run of quiet ones, with all that the members of its result are built from.

    States are those after the last window; `tester` is that of the site's reference then.
    """

    result: DriftWindowResult
    sums: MessageSums
    status: SuiteStatus
    gates: GateStates
    tester: DriftTester | None

    def extend(self, later: ClosedWindow, most: int) -> ClosedWindow | None:
        """Return both as one quiet run; None if one of them is not quiet, or both have more than `most` windows."""
        now, after = self.result, later.result
        if now.quiet is None or after.quiet is None or now.windows + after.windows > most:
            return None
        result = replace(
            now,
            rows=(now.rows[0], after.rows[1]),
            t=(now.t[0], after.t[1]),
            row_count=now.row_count + after.row_count,
            quiet=now.quiet.extend(after.quiet),
        )
        return replace(later, result=result, sums=self.sums + later.sums)


def merge_quiet(windows: Iterable[ClosedWindow]) -> list[ClosedWindow]:
    """Merge neighboring runs of quiet windows, as far as one message takes them."""
    merged: list[ClosedWindow] = []
    for window in windows:
        longer = merged[-1].extend(window, MAX_QUIET_WINDOWS) if merged else None
        if longer is None:
            merged.append(window)
        else:
            merged[-1] = longer
    return merged


def build_results(windows: Sequence[ClosedWindow], shipped: Reference) -> list[DriftWindowResult]:
    """Return the results with their members. Numbers of all windows are built together, once."""
    if not windows:
        return []
    sums = MessageSums.stack([window.sums for window in windows])
    columns = zip(
        windows,
        drift_message.build_features(sums, shipped),
        drift_message.build_output(sums, shipped),
        drift_message.build_estimates(sums, shipped),
        sums.mean_step_us.tolist(),
        sums.repeated_share.tolist(),
        strict=True,
    )
    results = []
    for window, features, output, estimate, step_us, repeated in columns:
        numbers = {"features": features, "output": output, "estimate": estimate}
        members = drift_message.add_states(numbers, window.status, window.tester)
        results.append(replace(window.result, members=_add_gates(members, window, step_us, repeated)))
    return results


def _add_gates(members: dict[str, Any], window: ClosedWindow, step_us: float, repeated: float) -> dict[str, Any]:
    """Add the member of each gate, and the state that follows."""
    states = {members["state"]}
    for gate in GATES:
        baseline = window.tester.reference.baselines[gate.name] if window.tester else None
        member = gate.build_member(window.gates[gate.name], step_us, repeated, baseline)
        members |= {gate.member: member}
        if baseline is not None:
            states.add(member["state"])
    return members | {"state": drift_message.worst_state(states)}
