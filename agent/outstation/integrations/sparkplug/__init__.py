"""Sparkplug B: devices of a fleet as nodes of an industrial control system."""
