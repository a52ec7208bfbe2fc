"""Figures and names as people read them."""

from __future__ import annotations

_NAMES = {
    "accuracy": "accuracy",
    "f1_macro": "F1, mean of classes",
    "f1_micro": "F1 of all decisions",
    "f1": "F1",
    "brier": "Brier score",
    "ece": "calibration error (ECE)",
    "mae": "mean absolute error",
    "rmse": "root mean square error",
    "r2": "R²",
    "bias": "mean error",
    "auc": "ROC AUC",
    "average_precision": "average precision",
}


def metric_name(metric: str) -> str:
    if metric.startswith("top_"):
        return f"in the top {metric.removeprefix('top_')}"
    return _NAMES.get(metric, metric)


def figure(value: float | None) -> str:
    """Three decimals, or three digits of what is larger or very small; a dash for none."""
    if value is None:
        return "–"
    if value == 0 or 0.001 <= abs(value) < 10:
        text = f"{value:.3f}"
    else:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{figure(low)}, {figure(high)}]"
