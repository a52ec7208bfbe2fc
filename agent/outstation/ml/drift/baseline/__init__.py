"""Baselines: what is normal for a task, and drift windows as numbers that add."""
