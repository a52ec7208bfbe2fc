"""Commands about labels, verdicts, and what to label next."""
