"""Statements on samples of readings, and on the labels, drift and alerts of a retraining set."""
