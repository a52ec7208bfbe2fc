"""Verification of an evidence folder from an untrusted source, with public keys and no database, config or network."""
