"""Batch prediction: `model run` over files, resumable, on one machine or on a Ray cluster."""
