"""Trials with other programs: each module has a function `run(folder)`, which raises AssertionError if one fails."""
