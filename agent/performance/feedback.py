"""Labels that are the model's own answers: few tell nothing, and many would make it learn its own mistakes."""

from __future__ import annotations

from agent.alerts import OWN_LABELS, Alert
from agent.performance.degradation import DegradationState

MAX_OWN_SHARE = 0.2


def check_feedback(state: DegradationState, own: int, n: int) -> Alert | None:
    """Whether labels that are the model's own answers have become many, or are no more; `own` of the newest `n`."""
    share = own / n if n else 0.0
    many = share > MAX_OWN_SHARE
    if many == state.feedback_open or (state.feedback_open and share > MAX_OWN_SHARE / 2):
        return None
    state.feedback_open = many
    state.feedback_count += many
    summary = (
        f"{share:.0%} of the last {n} labels are the model's own answers: trained on them, it would learn its own "
        "mistakes, and they say nothing about it. They are left out of every metric; let people label some."
        if many
        else f"labels are mostly others' than the model's again ({share:.0%} of the last {n} its own)."
    )
    build = OWN_LABELS.raised if many else OWN_LABELS.cleared
    return build(summary, {"own": own, "n": n}, count=state.feedback_count)
