"""Commands of the dashboard: serve it, and manage its accounts."""
