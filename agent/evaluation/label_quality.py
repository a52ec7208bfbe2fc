"""What the labels look like: classes that are rare, and labels the model contradicts with certainty.

Source of the latter: confident learning (Northcutt, Jiang, Chuang 2021): an answer is certain where its probability
reaches the usual one of that class among results that bear its label.
"""

from __future__ import annotations

import numpy as np

from agent.evaluation.document import Finding, Suspect
from agent.evaluation.examples import Examples
from agent.performance.metrics import Pairs

_UNEQUAL = 10
_FEW = 20
_MOST_SUSPECTS = 20
_MANY = 0.02
_CERTAIN = 0.9


def imbalance(counts: dict[str, int], accuracy: float | None) -> list[Finding]:
    """Of classes, by how many windows each has."""
    if not counts:
        return []
    most, least = max(counts, key=lambda c: counts[c]), min(counts, key=lambda c: counts[c])
    ratio = counts[most] / max(1, counts[least])
    share = counts[most] / sum(counts.values())
    found = []
    if ratio >= _UNEQUAL:
        text = f"{most} has {ratio:.0f} times as many windows as {least} ({counts[most]} and {counts[least]})"
        found.append(_warned("imbalance", f"{text}: read F1 and the classes, not accuracy alone."))
    if counts[least] < _FEW:
        text = f"{least} has {counts[least]} windows: too few to say how well it is told."
        found.append(_warned("few", text))
    if accuracy is not None and accuracy <= share:
        text = f"Accuracy {accuracy:.3f} is no better than always saying {most} ({share:.3f})."
        found.append(_warned("no better than one answer", text))
    usual = f"Classes have {counts[least]} to {counts[most]} windows."
    return found or [Finding(check="imbalance", state="ok", summary=usual)]


def noise(labels: list[str], pairs: Pairs, examples: Examples) -> tuple[list[Finding], list[Suspect]]:
    """Labels that are contradicted with certainty, the most certain first."""
    if pairs.full is None or pairs.said is None or not np.isfinite(pairs.full).all():
        return [], []
    truth, said, full = pairs.truth.astype(np.int64), pairs.said, pairs.full
    own = full[np.arange(len(truth)), truth]
    meant = np.bincount(truth, minlength=full.shape[1])
    with np.errstate(invalid="ignore"):
        usual = np.bincount(truth, own, full.shape[1]) / meant
    told = full[np.arange(len(said)), said]
    certain = (said != truth) & (told >= np.maximum(np.nan_to_num(usual[said], nan=1.0), _CERTAIN))
    ordered = np.flatnonzero(certain)[np.argsort(-told[certain], kind="stable")]
    suspects = [
        Suspect(
            row=int(examples.source.number[examples.last[i]]),
            file=examples.source.files[examples.source.part[examples.last[i]]].name,
            label=labels[truth[i]],
            said=labels[said[i]],
            score=float(f"{told[i]:.4g}"),
        )
        for i in ordered[:_MOST_SUSPECTS]
    ]
    share = len(ordered) / len(truth)
    text = f"{len(ordered)} of {len(truth)} labels ({share:.1%}) are contradicted with certainty"
    if share >= _MANY:
        return [_warned("label noise", f"{text}: look at them before the model; some may be wrong labels.")], suspects
    return [Finding(check="label noise", state="ok", summary=f"{text}.")], suspects


def _warned(check: str, summary: str) -> Finding:
    return Finding(check=check, state="warning", summary=summary)
