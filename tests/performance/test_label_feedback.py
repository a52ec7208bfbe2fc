"""Labels that are the model's own answers: said once when they become many, and once when they no longer are."""

from __future__ import annotations

from agent.performance import feedback
from agent.performance.degradation import DegradationState


def test_labels_that_are_the_models_own_answers_are_warned_of_once() -> None:
    state = DegradationState("sha256:a")
    assert feedback.check_feedback(state, 5, 100) is None
    raised = feedback.check_feedback(state, 30, 100)
    assert raised is not None
    assert (raised.subject, raised.state) == ("labels", "raised")
    assert raised.summary.startswith("30% of the last 100 labels are the model's own answers")
    assert feedback.check_feedback(state, 40, 100) is None
    assert feedback.check_feedback(state, 15, 100) is None
    cleared = feedback.check_feedback(state, 5, 100)
    assert cleared is not None
    assert (cleared.state, cleared.id) == ("cleared", raised.id)
