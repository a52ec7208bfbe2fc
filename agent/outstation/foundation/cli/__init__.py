"""Parts that commands share, and the list of commands."""
