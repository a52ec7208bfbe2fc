"""Models: bundles, inference, and the sandbox that models are tried in."""
