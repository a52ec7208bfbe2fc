"""Privacy of messages: the least count of readings behind a number, and what the owner of a field lets out."""
