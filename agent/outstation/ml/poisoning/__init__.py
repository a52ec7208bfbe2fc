"""Poisoned training data: labels, patterns and providers of labels that depart from the rest of a labelled set."""
