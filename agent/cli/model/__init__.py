"""Commands `outstation model …`."""
