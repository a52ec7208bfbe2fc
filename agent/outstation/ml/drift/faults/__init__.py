"""Sensor faults, distinguished from drift."""
