"""Format of an evidence folder, shared by the side that writes it and the side that verifies it."""
