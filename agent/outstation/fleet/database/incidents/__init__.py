"""Statements on incidents, on the state of devices that they are raised for, and on what people are told."""
