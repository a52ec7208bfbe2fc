"""Capacity of the device store: expiry, eviction by importance, and the messages that declare what is lost."""
