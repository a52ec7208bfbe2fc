"""A simulated fleet on one machine: real programs, replayed recordings, seeded faults."""
