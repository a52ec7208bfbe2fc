"""Retention: old evidence goes, and a signed statement of what went stays."""
