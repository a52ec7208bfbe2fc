"""Paired comparison of two bundles on the same windows: statistics, intervals and rules. Pure."""
