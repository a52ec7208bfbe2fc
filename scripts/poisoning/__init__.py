"""Trials of the poisoning checks: sets with known poison, and clean sets of several kinds."""
