"""Sandbox: child processes that probe, autotune and run models."""
