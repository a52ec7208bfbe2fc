"""Simulated fleets on one thread and a virtual clock: real device code, a broker in memory, a real collector.

scenario.py   the TOML of a scenario: groups of devices, events, labels
machine.py    the clock, boot ids and keys that the code of a simulated machine reads
feed.py       rows of a stream at the times at which they are due, with the faults of the scenario
device.py     a device: enrolment, daemon, uplink, power cuts
runner.py     the loop over all devices and the collector
attribution.py  which alerts an event explains
report.py     what was injected and what was found
"""
