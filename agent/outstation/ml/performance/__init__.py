"""Model performance from labels: metrics, intervals, slices, degradation and expected accuracy."""
