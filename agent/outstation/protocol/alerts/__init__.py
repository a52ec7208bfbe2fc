"""Alerts: their value and lifecycle, and the table of their kinds."""
