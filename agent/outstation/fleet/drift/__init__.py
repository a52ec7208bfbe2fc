"""Fleet drift: merge the drift windows of all devices, find outliers, onsets and fleet-wide drift."""
