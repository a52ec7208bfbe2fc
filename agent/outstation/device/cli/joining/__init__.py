"""Commands with which a device asks to join a fleet, and joins it."""
