"""Retraining sets: sampled readings joined with labels and verdicts, as they were known at a time."""
