"""Commands that let devices in."""
