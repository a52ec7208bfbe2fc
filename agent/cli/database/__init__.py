"""Commands that look into the SQLite databases of a device and of a fleet, read only."""
