"""Commits of the store: small ones in a journal, and the watermark that tells of lost ones."""
