"""State of the dashboard: access to the database, the devices in memory, and the feed of changes."""
