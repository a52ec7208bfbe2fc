"""Audit of the fleet database: verify all stored messages and rollouts again."""
