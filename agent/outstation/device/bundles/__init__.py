"""Bundles on the device: history, overrides, quarantine, crash marker and rollout state."""
