"""Text for people: figures, metric names, and foreign text made safe to print."""

from __future__ import annotations

_METRIC_NAMES = {
    "accuracy": "accuracy",
    "f1_macro": "F1, mean of classes",
    "f1_micro": "F1 of all decisions",
    "f1": "F1",
    "brier": "Brier score",
    "brier_top": "Brier score of the top class",
    "ece": "calibration error (ECE)",
    "mae": "mean absolute error",
    "rmse": "root mean square error",
    "r2": "R²",
    "bias": "mean error",
    "auc": "ROC AUC",
    "average_precision": "average precision",
}


def printable(text: str) -> str:
    """Return `text` on one line, with everything that could steer a terminal escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def metric_name(metric: str) -> str:
    """Return the display name of a metric; an unknown metric keeps its own name."""
    if metric.startswith("top_"):
        return f"in the top {metric.removeprefix('top_')}"
    return _METRIC_NAMES.get(metric, metric)


def format_value(value: float | None) -> str:
    """Format with three decimals, or with three digits where it is large or very small; a dash for None."""
    if value is None:
        return "–"
    if value == 0 or 0.001 <= abs(value) < 10:
        text = f"{value:.3f}"
    else:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def format_interval(low: float | None, high: float | None) -> str:
    """Format an interval; empty without both ends."""
    return "" if low is None or high is None else f"[{format_value(low)}, {format_value(high)}]"
