"""Documents that are signed and are no messages: heads of logs, and requests to join a fleet."""
