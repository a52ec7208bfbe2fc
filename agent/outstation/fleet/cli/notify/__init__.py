"""`outstation fleet notify`: test targets of notifications, and show what waits."""
