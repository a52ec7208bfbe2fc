"""Models, drift, performance, comparison, data sets: arrays in, values out."""
