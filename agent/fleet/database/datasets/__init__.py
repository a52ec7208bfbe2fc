"""Statements on samples of readings, and on what a retraining set says of them."""
