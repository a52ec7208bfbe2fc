"""Sensor faults, told apart from drift."""
