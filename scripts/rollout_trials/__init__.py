"""Rollout trials: good and bad bundles in a simulated fleet, checked for the expected end."""
