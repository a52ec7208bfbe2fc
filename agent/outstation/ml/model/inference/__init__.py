"""Inference: rows to windows, the TFLite runtime, outputs to labels and scores."""
