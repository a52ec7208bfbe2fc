"""Remote commands: received, executed once, answered, and recorded in the audit log."""
