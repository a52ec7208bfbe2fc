"""Composition root: the only place where the objects of a device are put together."""
