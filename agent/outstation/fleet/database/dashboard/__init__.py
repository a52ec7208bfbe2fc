"""SQL of the dashboard: the state of devices, results over time, single messages, accounts and sessions."""
