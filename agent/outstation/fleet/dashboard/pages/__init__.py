"""Pages of the dashboard: a request in, a rendered template out."""
