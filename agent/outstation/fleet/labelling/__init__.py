"""Labels and verdicts at the collector, what to label next, and feedback loops."""
