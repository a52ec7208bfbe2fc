"""Alert sentences: what happened, how much, and the likely cause."""

from __future__ import annotations

from collections.abc import Sequence

from outstation.foundation.text import format_since
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.baseline.summary import Summary
from outstation.ml.drift.faults.faults import Fault
from outstation.ml.drift.faults.missing_values import MissingValues
from outstation.ml.drift.numeric.escalation import MIN_SCORE

CAUSES = {
    "missing": "sensor or cable fault, or its source stopped",
    "stuck": "sensor or cable fault",
    "saturated": "range set too small, sensor at its end, or a level that is held",
    "swapped": "cables or columns were exchanged",
    "reversed": "the sensor was turned round, or its poles exchanged",
    "unit": "a converter, driver or firmware was changed",
    "out_of_range": "another unit or sensor, a fault, or a state that was never seen here",
    "quantized": "another converter, range or rounding",
    "spikes": "loose contact or interference",
}


def fault_sentence(
    field: int, fault: Fault, summary: Summary, missing: MissingValues, last: int, shipped: Reference
) -> str:
    """Describe a fault of field number `field` in a window that ended at `last` (epoch µs).

    The sentence names no value: an extreme is one row's. `missing` is the state of that chart.
    """
    subject = shipped.fields[field]
    symptom = {
        "missing": _describe_missing(field, missing, last),
        "stuck": f"repeats one value for {fault.detail}",
        "saturated": _describe_saturation(field, summary, shipped),
        "out_of_range": f"{summary.outside[field] / max(1, summary.rows):.0%} of values lie far outside "
        "the reference's range",
        "quantized": f"values come in steps about {fault.detail} as coarse as they were here",
        "spikes": f"{summary.spikes[field]} lone jumps in {summary.rows} rows",
        "swapped": f"reads like {fault.detail} did, and {fault.detail} like {subject}",
        "reversed": "reads as before but with the sign reversed",
        "unit": f"reads like {fault.detail}",
    }[fault.name]
    return f"{subject}: {symptom}: {CAUSES[fault.name]}."


def fault_growth_note(fault: Fault, published: float) -> str:
    """Say how much a fault grew since its alert was last published."""
    unit = {
        "missing": "{:.1%} of values are missing",
        "saturated": "{:.0%} of values are held",
        "out_of_range": "{:.0%} of values lie outside",
        "spikes": "{:.1%} of rows jump",
        "quantized": "steps are {:.0f} times as coarse",
    }[fault.name]
    return f" It grew: {unit.format(fault.size)} now, {unit.format(published)} before."


def drift_growth_note(published: float, size: float) -> str:
    """Say how a drift changed since its alert was last published; sizes are in sd of a window's statistic.

    A `published` size of 0 stands for one below MIN_SCORE.
    """
    change = "turned round" if published * size < 0 else "grew"
    before = f"{published:.2g}" if published else f"less than {MIN_SCORE:g}"
    return f" It {change} since the last alert: from {before} to {size:.2g} sd of a drift window."


def _describe_missing(field: int, missing: MissingValues, last: int) -> str:
    share, rows = float(missing.share[field]), int(missing.rows[field])
    since = f" since {format_since(int(missing.since[field]), last)} UTC" if missing.since[field] else ""
    return f"{share:.{0 if share > 0.05 else 1}%} of values are missing ({missing.missing[field]} of {rows}{since})"


def _describe_saturation(field: int, summary: Summary, shipped: Reference) -> str:
    piles = summary.extremes.rows[field, :, 0]
    side = int(piles.argmax())
    value, limit = (
        (summary.extremes.low[field], shipped.low[field]),
        (summary.extremes.high[field], shipped.high[field]),
    )[side]
    name = ("lowest", "highest")[side]
    # The limits of bins are public in the bundle, so naming one reveals no reading.
    at = f"{limit:.6g}, the {name} of the shipped reference" if value == limit else f"the {name} of this window"
    return f"{piles[side] / max(1, summary.rows):.0%} of values are held at {at}"


def fault_cleared_sentence(subject: str, fault: str, windows: int) -> str:
    return f"{subject}: no fault of the kind {fault} for {windows} windows in a row."


def drift_cleared_sentence(subject: str, windows: int) -> str:
    return f"{subject}: close to this site's reference for {windows} windows in a row."


def withdrawn_sentence(subject: str, misread: Sequence[str]) -> str:
    return f"{subject}: no drift of its own: {', '.join(misread)} {'are' if len(misread) > 1 else 'is'} read wrongly."


def misclassification_note(drifted_fields: Sequence[str]) -> str:
    """Note other fields that drift: statistics are compared within the class that the model names."""
    if not drifted_fields:
        return ""
    names = ", ".join(drifted_fields)
    verb = "drifts" if len(drifted_fields) == 1 else "drift"
    return f" {names} {verb}, too: the model may name wrong classes since, and this may follow from it."
