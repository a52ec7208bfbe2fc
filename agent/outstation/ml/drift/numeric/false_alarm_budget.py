"""False-alarm budget: how many false alarms each kind of test may raise; `control_limits` derives limits from it."""

from __future__ import annotations

import math

# False alarms per window, of all tests of a kind together.
FIELD_BUDGET, PAIR_BUDGET, SCORE_BUDGET, CLASS_SHARE_BUDGET = 1.5e-3, 3e-4, 3e-4, 3e-4
CLASS_SHARE_MEWMA_BUDGET = 3e-4
# For each field, up to this number: with more fields, their sums gain more over each field alone.
FIELD_MEWMA_BUDGET, MAX_MEWMA_FIELDS = 4e-4, 15
PSI_BUDGET, SPEED_BUDGET = 3e-4, 3e-4
MISSING_BUDGET, ACCURACY_BUDGET = 3e-4, 3e-4
DISPERSION_BUDGET = 2e-4  # of offsets that come and go
FAULT_BUDGET = 5e-4  # of all symptoms of other sensor faults
# Budget of a model's answers, which all of its outputs share.
ANSWERS_BUDGET = SCORE_BUDGET + CLASS_SHARE_BUDGET + CLASS_SHARE_MEWMA_BUDGET + ACCURACY_BUDGET
# Slack: half the shift that should be found fast, in sd of the window's statistic. Fields seldom stop moving together
# by halves, and there are many pairs.
FIELD_SLACK, PAIR_SLACK = 1.0, 2.0
# Limits never go below these: real windows are a little more alike than a reference can tell.
MIN_CUSUM_LIMIT, MIN_PAIR_LIMIT = 5.0, 3.5
MIN_BERNOULLI_LIMIT = 11.0  # four values in a row where hardly any was missing: fewer are a hiccup


def mewma_budget(fields: int) -> float:
    """Return false alarms per window of a MEWMA chart over this number of fields."""
    return FIELD_MEWMA_BUDGET * min(fields, MAX_MEWMA_FIELDS)


def exceedance_level(subjects: int, budget: float = PSI_BUDGET) -> float:
    """Return the share of windows in which one subject may exceed its PSI limit: two of three do so by chance."""
    return math.sqrt(budget / (3 * max(1, subjects)))
