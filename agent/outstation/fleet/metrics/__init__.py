"""Prometheus metrics of a fleet and of its collector. prometheus_client is imported here only."""
