"""Incidents: alerts of devices and of the collector with what operators said about them, and their detection."""
