"""Simulated fleet: real programs on one machine, on replayed recordings with seeded faults."""
