"""Roll-outs of good and ill bundles in a simulated fleet, and whether each ended as it should."""
