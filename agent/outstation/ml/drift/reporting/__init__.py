"""Drift messages and alert texts, and their parser."""
