"""Fixtures of the test kit for this folder's tests."""

pytest_plugins = ["outstation.workbench.testing.fixtures"]
