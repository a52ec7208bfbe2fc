"""Comparison of drift detectors for `scripts/bench drift`: false alarms, detection delay and cost.

synthetic.py    seeded rows without a change, and with known changes
counting.py     alarms by window and subject, and their summary
ours.py         our drift monitor over these rows
peers.py        other detectors over the same rows, each in its own process
peer.py         the program of such a process; peers*.txt are its environments (`scripts/setup peers`)
recordings.py   smartwatch recordings of people outside the model's training set
shuttle.py      nine sensors with labelled ground truth, shipped in the wheel of river
cost.py         processor time per row, and memory
error_cases.py  regression models with held-out labels, for `scripts/bench drift-errors`
tables.py       the report
"""
