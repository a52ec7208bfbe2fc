"""Commands on the rows of a device."""
