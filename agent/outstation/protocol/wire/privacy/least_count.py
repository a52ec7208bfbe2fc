"""Least count: no number that leaves the device rests on fewer readings, in any outgoing message.

A cell (bin, class, slice, moment) of fewer is merged into a neighbor or a rest, or left out; `withheld` counts what was
left out. `k` is the least count everywhere; 1 lets everything pass. Results, one per model window, are the product and
pass as they are. `docs/concepts/privacy.md` lists the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from outstation.protocol.wire import runs

OTHER = "other"  # classes with too few to be named
WITHHELD = "withheld"
_EFFECTS = ("mean", "m2", "psi", "js", "ks", "w1")
_EMPTY_MOMENTS = {"n": 0, "mean": 0.0, "m2": 0.0}
Body = Mapping[str, Any]


def apply(kind: str, body: Body, k: int) -> Body:
    """Return the members of a message of this kind that may leave the device."""
    if k <= 1 or kind in _UNRESTRICTED:
        return body
    return _RULES.get(kind, _withhold_small_samples)(body, k)


def apply_to_alert(alert: Body, window: Body, k: int) -> Body:
    """Return the members of an alert about a drift window; without numbers if those of the window are withheld."""
    subject = alert["subject"]
    readings = {
        name: sum(field["counts"]) + field["below"] + field["above"] for name, field in window["features"].items()
    }
    concerned = [readings[subject]] if subject in readings else list(readings.values())
    if not any(_is_few(n, k) for n in (window["window"]["n"], *concerned)):
        return alert
    evidence = {name: value for name, value in alert["evidence"].items() if name in _NAMES_OF_EVIDENCE}
    summary = f"{subject}: {alert['alert']} {alert['state']}; its drift window has fewer than {k} readings, so its "
    return {**alert, "summary": f"{summary}numbers are withheld.", "evidence": evidence}


def merge_small_bins(counts: Sequence[int], k: int) -> list[int]:
    """Move rows so that no bin is above zero and below `k`, unless all rows together are."""
    merged, pending, last = [0] * len(counts), 0, 0
    for at, count in enumerate(counts):
        pending += count
        if pending >= k:
            merged[at], pending, last = pending, 0, at
    merged[last] += pending
    return merged


def merge_small_classes(counts: Mapping[str, int], k: int) -> dict[str, int]:
    """Count classes below `k` together, with a further class if these are few, too."""
    few = {name: n for name, n in counts.items() if _is_few(n, k)}
    rest = {name: n for name, n in counts.items() if name not in few}
    while _is_few(sum(few.values()), k) and (used := {name: n for name, n in rest.items() if n}):
        name = min(used, key=lambda name: rest[name])
        few[name] = rest.pop(name)
    return rest | ({OTHER: sum(few.values())} if few else {})


def select_cells(
    cells: Mapping[str, Collection[int]], published: Mapping[str, Collection[int]], k: int
) -> dict[str, list[int]]:
    """Return the cells of one partition that may be published, with their members.

    `cells` and the newest `published` ones hold the numbers of their members. A cell is left out if it has fewer than
    `k`, or differs by fewer from what was published before: the difference of both would show those. So is a further
    cell while all that are left out together are that few, as the total would show them.
    """
    sizes = {name: len(members) for name, members in cells.items()}
    changes = {name: len(set(members) ^ set(published.get(name, ()))) for name, members in cells.items()}
    hidden = {name for name in cells if _is_few(sizes[name], k) or _is_few(changes[name], k)}
    while hidden and any(_is_few(sum(count[name] for name in hidden), k) for count in (sizes, changes)):
        shown = [name for name in cells if name not in hidden and sizes[name]]
        if not shown:
            break
        hidden.add(min(shown, key=lambda name: sizes[name]))
    return {name: sorted(members) for name, members in cells.items() if name not in hidden}


def _is_few(count: int, k: int) -> bool:
    return 0 < count < k


def _limit_drift(body: Body, k: int) -> Body:
    rows = body["window"]["n"]
    features = {name: _limit_field(field, k) for name, field in body["features"].items()}
    output, predictions = _limit_output(body["output"], k)
    limited = {**body, "features": features, "output": output}
    if _is_few(predictions, k):
        limited["estimate"] = None
    if _is_few(rows, k) or any(WITHHELD in field for field in features.values()):
        limited["joint"] = {**body["joint"], "cusum": None}
        further = {name: {**part, "cusum": []} for name, part in output.get("further", {}).items()}
        output = {**output, "score": {**output["score"], "cusum": []}}
        limited["output"] = output | ({"further": further} if further else {})
        limited["rate"] = body["rate"] | {"step_us": None, "repeated": None, "cusum": []}
    if (windows := body.get("windows")) is not None:
        limited["windows"] = _limit_run(windows, k)
    return limited


def _limit_field(field: Body, k: int) -> Body:
    bins = [field["below"], *field["counts"], field["above"]]
    readings = sum(bins)
    if not _is_few(readings, k):
        below, *inner, above = merge_small_bins(bins, k)
        return {**field, "counts": inner, "below": below, "above": above}
    empty = {"counts": [0] * len(field["counts"]), "below": 0, "above": 0, WITHHELD: readings}
    return {**field, **empty, **dict.fromkeys(_EFFECTS), "cusum": {"limit": field["cusum"]["limit"]}}


def _limit_output(output: Body, k: int) -> tuple[dict[str, Any], int]:
    """Return the member `output`, and the number of predictions that it counts."""
    limited, total = _limit_main_output(output, k)
    further = {name: _limit_further_output(part, k) for name, part in output.get("further", {}).items()}
    return limited | ({"further": further} if further else {}), total


def _limit_further_output(output: Body, k: int) -> dict[str, Any]:
    """Return the counts of a further output: of its labels, and of each value by bin."""
    limited = dict(output)
    sizes = {name: sum(value["counts"]) for name, value in output["values"].items()}
    if any(_is_few(n, k) for n in (*sizes.values(), sum(output.get("counts", {}).values()))):
        empty = {name: {"counts": [0] * len(value["counts"]), "psi": None} for name, value in output["values"].items()}
        limited |= {"values": empty, "cusum": [], WITHHELD: max(sizes.values(), default=0)}
        limited |= {"counts": {}, "psi": None} if "counts" in output else {}
        return limited | ({"estimate": None} if "estimate" in output else {})
    merged = {
        name: {**value, "counts": merge_small_bins(value["counts"], k)} for name, value in output["values"].items()
    }
    labels = {"counts": merge_small_classes(output["counts"], k)} if "counts" in output else {}
    return limited | {"values": merged} | labels


def _limit_main_output(output: Body, k: int) -> tuple[dict[str, Any], int]:
    """Return the counts of the main output, and the number of predictions that they count."""
    counts = output["counts"]
    total = sum(counts.values() if isinstance(counts, Mapping) else counts)
    if _is_few(total, k):
        empty = {} if isinstance(counts, Mapping) else [0] * len(counts)
        cusum = {"score": {**output["score"], "cusum": []}}
        return {**output, "counts": empty, "psi": None, WITHHELD: total, **cusum}, total
    if isinstance(counts, Mapping):
        return {**output, "counts": merge_small_classes(counts, k)}, total
    return {**output, "counts": merge_small_bins(counts, k)}, total


def _limit_run(windows: Body, k: int) -> Body:
    """Leave out how near to its limit a test was after a window of few rows."""
    sizes = runs.expand_integers(windows["n"])
    nearest = [None if _is_few(n, k) else share for n, share in zip(sizes, windows["nearest"], strict=True)]
    return {**windows, "nearest": nearest}


def _limit_quality(body: Body, k: int) -> Body:
    labels, metrics = dict(body["labels"]), [metric for metric in body["metrics"] if not _is_few(metric["n"], k)]
    for name in ("sources", "classes"):
        if name in labels:
            labels[name] = {} if _is_few(labels["n"], k) else merge_small_classes(labels[name], k)
    if "classes" in labels and labels["classes"] != body["labels"]["classes"]:
        labels["imbalance"] = None
    if _is_few(labels["n"], k):
        labels["delay_s"] = None
    estimate = None if _is_few(body["window"]["n"], k) else body["estimate"]
    withheld = body.get(WITHHELD, 0) + len(body["metrics"]) - len(metrics)
    return {**body, "labels": labels, "metrics": metrics, "estimate": estimate, WITHHELD: withheld}


def _limit_shadow(body: Body, k: int) -> Body:
    """Leave out moments of few windows, and outcomes of few labels."""
    limited = {**body, "difference": _limit_moments(body["difference"], k)} if "difference" in body else {**body}
    few_labels = _is_few(sum(body.get("labelled", [])), k)
    if few_labels:
        limited["labelled"] = [0, 0, 0, 0]
    for side in ("stats", "other_stats"):
        stats = {
            name: _limit_moments(value, k) if isinstance(value, Mapping) else value
            for name, value in body[side].items()
        }
        limited[side] = stats | ({"correct": 0} if few_labels and "correct" in stats else {})
    if body.get("agreeing") is not None and _is_few(body["n"], k):
        limited |= {"n": 0, "agreeing": 0}
    if "outputs" in body:
        limited["outputs"] = {name: _limit_shadow(part, k) for name, part in body["outputs"].items()}
    return limited


def _limit_samples(body: Body, k: int) -> Body:
    limited = {**body, "sealed": ""} if _is_few(body["n"], k) else body
    if "joined" not in body:
        return limited
    is_few = any(_is_few(each["n"], k) for each in body["joined"].values())
    return {**limited, "joined": {}} if is_few or not limited["sealed"] else limited


def _limit_moments(moments: Body, k: int) -> Body:
    return _EMPTY_MOMENTS if _is_few(moments["n"], k) else moments


def _withhold_small_samples(body: Body, k: int) -> Body:
    """Leave out the members of every object that says it is of few (`n`)."""
    limited: Body = _limit_objects(body, k)
    return limited


def _limit_objects(value: Any, k: int) -> Any:
    if isinstance(value, Mapping):
        n = value.get("n")
        if isinstance(n, int) and _is_few(n, k):
            return {WITHHELD: n}
        return {name: _limit_objects(member, k) for name, member in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_limit_objects(member, k) for member in value]
    return value


# Results are the product; the others carry no data.
_UNRESTRICTED = frozenset({"results", "state", "keys"})
_NAMES_OF_EVIDENCE = frozenset({"seq", "window", "rows", "test", "fault", "site"})
_RULES: dict[str, Callable[[Body, int], Body]] = {
    "drift": _limit_drift,
    "quality": _limit_quality,
    "shadow": _limit_shadow,
    "samples": _limit_samples,
}
