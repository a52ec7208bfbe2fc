"""Statements for the bridge to other systems."""
