"""Commands that run on a device."""
