"""Samples: readings around alerts, uncertain results and results that are asked for, sent where the owner consents."""
