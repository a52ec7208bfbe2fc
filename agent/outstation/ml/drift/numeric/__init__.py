"""Sums, divergences and false-alarm budgets: arrays only."""
