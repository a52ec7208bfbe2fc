"""Statements on incidents, on the state of devices that they are raised for, and on notifications."""
