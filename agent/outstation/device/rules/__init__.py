"""Alert rules on results: compiled for a bundle's output, evaluated over windows, and kept in the store."""
