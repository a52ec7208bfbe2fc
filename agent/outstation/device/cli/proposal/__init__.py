"""Proposal of a stream: a config section from a file, or from messages on a broker."""
