"""`outstation fleet alerts notify`: test targets of notifications, and show what waits."""
