"""Succession of bundles: what drift detection keeps when another bundle takes over a task.

A broken sensor stays broken whichever model reads it. A bundle with the same fields, labels and windows inherits the
site's reference and every open alert. The fields stay tested. Another reference is gathered meanwhile, because the
new model's answers and scores have none. Until it is learned, the accuracy or error to expect is compared with none.
Any other bundle begins anew: faults of shared fields stay open, and so do drift alerts, as *open before the change*,
until a reference is learned that does not deviate from the former one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Bools
from outstation.ml.drift.baseline.learning_state import LearningState
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.baseline.summary import Summary
from outstation.ml.drift.detectors.detector import Task
from outstation.ml.drift.detectors.registry import GATES, GateStates
from outstation.ml.drift.sequential.test_suite import SuiteState
from outstation.ml.drift.state import CarriedAlert, DriftState, start_next_window
from outstation.protocol.alerts.alert import Alert
from outstation.protocol.alerts.kinds import monitored_names, monitoring_kind

_DRIFT = 0  # column of the alerts raised so far


def is_heir(reference: Reference, other: Reference) -> bool:
    """Return True if a bundle with this shipped reference can inherit what was learned with the other one."""
    # Held-out errors give a further output one more test, which the sums, limits and cycles of the site lack.
    return all(
        getattr(reference, name) == getattr(other, name) for name in ("fields", "labels", "window_rows", "modes")
    ) and (reference.task.further == other.task.further)


def merge_references(former: Reference, new: Reference) -> Reference:
    """Return a shipped reference with the fields' bins and limits of the former one, and the new model's answers."""
    return replace(
        former,
        output=new.output,
        score_edges=new.score_edges,
        score_n=new.score_n,
        score_correct=new.score_correct,
        further=new.further,
        error=new.error,
    )


def inherit(state: DriftState, shipped: Reference) -> DriftState:
    """Return the state for a bundle whose merged reference is `shipped`, which inherits site reference and alerts."""
    if state.open_summary.reference == shipped.digest:
        return state
    empty = Summary.empty(shipped)
    state = replace(start_next_window(state, empty), index=state.index, learning=LearningState.empty(shipped))
    if state.site_reference is None:
        return state
    answers = _select_answers(state.suite.task)
    carried = _open_drifts(state, answers & state.suite.open_subjects)
    return replace(
        state,
        suite=forget_answers(state.suite),
        # A reference that nobody accepted stays held.
        guard=replace(state.guard.begin_learning(state.site_reference), is_held=state.guard.is_held),
        carried=(*state.carried, *carried),
        is_inherited=True,
    )


def forget_answers(suite: SuiteState) -> SuiteState:
    """Forget the evidence on the answers and scores of the model."""
    return replace(suite.reset_subjects(_select_answers(suite.task)), recent_scores=np.zeros_like(suite.recent_scores))


def _select_answers(task: Task) -> Bools:
    """Return (F + 3 + H,) which subjects are the model's answers."""
    answers = np.zeros(task.subject_count, np.bool_)
    answers[task.answers] = True
    return answers


def carry_over(fresh: DriftState, old: DriftState) -> tuple[DriftState, list[Alert]]:
    """Return a `fresh` state that carries over the open alerts of `old`, and the alerts that this changes."""
    # Ids of alerts are never used twice.
    raised = np.full_like(fresh.raised_counts, old.raised_counts.max(initial=0))
    shared = {fresh.fields.index(name): at for at, name in enumerate(old.fields) if name in fresh.fields}
    dropped = [name for name in old.fields if name not in fresh.fields]
    open_drifts = [*old.carried, *_open_drifts(old, old.suite.open_subjects)]
    carried = [item for item in open_drifts if item.subject not in dropped]
    ended = [item for item in (*open_drifts, *_open_faults(old)) if item.subject in dropped]
    alerts = clear_carried(ended, "the bundle was changed, and the new one does not read this field")
    for gate in GATES:
        alerts += gate.clear_alerts(old.gates[gate.name], "the bundle was changed", {})
    alerts += [build_carried_alert(item) for item in carried]
    state = replace(
        fresh,
        raised_counts=raised,
        learned_count=old.learned_count,
        faults=fresh.faults.take_over(old.faults, shared),
        gates=GateStates({gate.name: gate.restart(old.gates[gate.name]) for gate in GATES}),
        guard=old.guard.begin_learning(old.site_reference),
        carried=tuple(carried),
    )
    return state, alerts


def end(state: DriftState) -> DriftState:
    """Return the state with nothing open, after the change to a bundle without a reference.

    `carry_over` continues its alert numbers, and compares the next reference of the site with the last one.
    """
    guard = replace(state.guard.begin_learning(state.site_reference), deviations=())
    return replace(
        state,
        site_reference=None,
        suite=SuiteState.start(state.suite.task),
        faults=state.faults.drop(state.faults.number > 0),
        gates=GateStates({gate.name: gate.restart(state.gates[gate.name]) for gate in GATES}),
        guard=guard,
        carried=(),
        is_inherited=False,
    )


def build_carried_alert(carried: CarriedAlert) -> Alert:
    """Return the alert, raised as before."""
    kind = monitoring_kind(carried.alert, carried.subject)
    summary = f"{carried.subject}: open before the change of the bundle; no reference tells yet whether it goes on."
    return kind.raised(summary, {"carried": True}, **monitored_names(carried.subject), count=carried.count)


def list_open_alerts(state: DriftState) -> list[CarriedAlert]:
    """Return the open alerts of fields, answers and correlations, with those that were carried over."""
    return [*state.carried, *_open_drifts(state, state.suite.open_subjects), *_open_faults(state)]


def clear_carried(carried: Sequence[CarriedAlert], reason: str) -> list[Alert]:
    return [
        monitoring_kind(item.alert, item.subject).cleared(
            f"{item.subject}: {reason}.", None, **monitored_names(item.subject), count=item.count
        )
        for item in carried
    ]


def _open_drifts(state: DriftState, subjects: Bools) -> list[CarriedAlert]:
    """Return the newest drift alerts of these subjects (F + 3 + H,)."""
    names, numbers = state.subjects, state.raised_counts[:, _DRIFT]
    return [CarriedAlert("drift", names[at], int(numbers[at])) for at in np.flatnonzero(subjects).tolist()]


def _open_faults(state: DriftState) -> list[CarriedAlert]:
    numbers = state.faults.number
    return [
        CarriedAlert("fault", state.fields[field], int(numbers[field, kind]))
        for field, kind in np.argwhere(numbers > 0).tolist()
    ]
