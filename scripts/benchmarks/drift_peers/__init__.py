"""What `scripts/bench drift` measures: how often drift detectors cry wolf, how soon they see a change, what they cost.

synthetic.py         rows in which nothing happens, and changes of them, from a seed
counting.py     alarms by window and subject, and what they come to
ours.py         the whole judge over such rows
peers.py        other detectors over the same rows, each in a process of its own
peer.py         what runs there; peers*.txt are its environments (`scripts/setup peers`)
recordings.py   the smartwatch recordings of people whom the model never saw
shuttle.py      readings of nine sensors with labelled truth, which ship in the wheel of river
cost.py         processor time per row and memory
tables.py       all of it for people
"""
