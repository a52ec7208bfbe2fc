"""Fleet side: enrol devices, collect and verify their messages, and prove that nothing is lost.

    broker → collector: receive → verify → store → acknowledge          database → audit, drift, watch, evidence

config          fleet.toml                       database     all SQL: ingest, gaps, projection, keys, timestamps
enrolment       files, certificates, revocation  collector    the collector's loop, acknowledgements, leader
commands        remote commands to devices       audit        verify stored messages and rollouts again
labels          labels joined with results       drift        drift of the whole fleet
bundle_history  which bundle ran when            rollout      plans, decisions, promotion
watch           live view                        repository   TUF repository of bundles
                                                 evidence     signed folder for auditors
"""
