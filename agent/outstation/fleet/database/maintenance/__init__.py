"""Maintenance of the fleet database: pruning of old rows, copying between databases."""
