"""Recovery: opens the device store, and repairs it if it was damaged, restored, replaced or made by an older version.

open             lock, integrity check; returns the `Store`   salvage, copy, raw_pages  damaged databases
migrate          tables of older versions                     catch_up                  lost commits and meta values
findings         what was found, until it is reported         report_findings           the report
new_log          a log that replaces one that cannot continue
"""
