"""Bundles: the format of a model with its manifest, signature, golden vectors and drift reference."""
