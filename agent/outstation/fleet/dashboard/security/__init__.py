"""Security of the dashboard: what a request may be, who makes it, and how often somebody may try to sign in."""
