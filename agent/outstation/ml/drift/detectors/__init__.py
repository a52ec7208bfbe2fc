"""Drift detectors, one module each, and the charts that judge their scores."""
