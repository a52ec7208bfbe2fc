"""Tables of the store's database: their schema, single values, checksums of rows, and SQLite's errors."""
