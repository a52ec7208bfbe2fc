"""Fleet database: all SQL of the collector, for SQLite and PostgreSQL."""
