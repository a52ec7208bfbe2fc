"""Feedback loops at the collector: people or programs whose labels only repeat what the model answered.

A person who confirms every result, although the model's scores predict errors, does not check them: such labels only
repeat the model's answers. Chernoff's bound gives the probability of so few corrections.
"""

from __future__ import annotations

from typing import Any

from outstation.fleet.database.interface import Connection
from outstation.fleet.database.labelling import verdicts as table
from outstation.ml.performance.degradation import MAX_OWN_SHARE, Agreement

_MIN_LABELS = 20


def find(db: Connection, device: str | None = None, task: str | None = None) -> list[dict[str, Any]]:
    """Return a warning for each device, task and author with a sign of a loop; `kind` is `agrees` or `own_answers`."""
    warnings = []
    for row in table.compare_with_scores(db, device, task):
        name, task_name, by, origin, n, wrong, expected = row
        if Agreement(n, wrong, expected).is_implausible:
            noun = "verdicts" if origin == "verdicts" else "labels"
            summary = (
                f"{by} contradicted {wrong} of {n} results of {task_name} at {name}, whose scores predict about "
                f"{expected:.0f} errors: these {noun} seem to repeat the model's answers. Label some results "
                "without seeing the answer (`fleet labels next` lists random ones)."
            )
            head = {"kind": "agrees", "device": name, "task": task_name, "by": by, "origin": origin}
            warnings.append({**head, "n": n, "wrong": wrong, "expected_wrong": round(expected, 2), "summary": summary})
    for name, task_name, output, own, n in table.count_own_answers(db, device, task):
        if n >= _MIN_LABELS and own > MAX_OWN_SHARE * n:
            subject = f"{task_name}, output {output}," if output else task_name
            summary = (
                f"{own} of {n} labels of {subject} at {name} are the model's own answers (source model): they count "
                "in no metric; do not train on them."
            )
            head = {"kind": "own_answers", "device": name, "task": task_name, "by": "", "origin": "labels"}
            of_output = {"output": output} if output else {}
            warnings.append({**head, **of_output, "n": n, "own": own, "summary": summary})
    return warnings
