"""Facts of an evidence folder, read from the collector's database, its signed messages and the fleet's folder."""
