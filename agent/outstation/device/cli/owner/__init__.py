"""Commands for the device's owner: what leaves, and the rows that an auditor is shown."""
