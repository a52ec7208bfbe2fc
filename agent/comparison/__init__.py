"""Two bundles over the same windows: what they said is added up, and judged with intervals. Pure."""
