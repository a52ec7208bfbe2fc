"""Plots of drift: from timelines to pictures."""
