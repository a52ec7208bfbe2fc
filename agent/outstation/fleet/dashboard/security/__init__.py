"""Security of the dashboard: what a request may be, who makes it, and how often a person may try to sign in."""
