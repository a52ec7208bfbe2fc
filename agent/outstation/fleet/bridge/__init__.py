"""Bridge of the collector: verified messages of the database, published for other systems."""
