"""Evaluation of a bundle on labelled data: metrics with intervals, sensitivity, leakage checks, reports and cards."""
