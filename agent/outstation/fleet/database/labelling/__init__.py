"""Statements on labels and verdicts of results and alerts."""
