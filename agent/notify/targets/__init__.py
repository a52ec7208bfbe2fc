"""Targets of notifications: one module each, imported when a target of its kind is used."""
