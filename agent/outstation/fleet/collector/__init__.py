"""Collector: receive, verify, store and acknowledge the messages of a fleet."""
