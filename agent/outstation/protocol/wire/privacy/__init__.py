"""Privacy of messages: the least count of readings behind a number, and the owner's rules for each field."""
