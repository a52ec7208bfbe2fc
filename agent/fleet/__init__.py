"""The fleet side: enrols devices, collects what they sign, proves that nothing is lost.

    broker → collect: receive → verify → store → acknowledge          store → audit, watch, reports

config     fleet.toml                                   collect  the collector's loop
pki        keys and certificates, mosquitto the broker's config, enrol a device's files
store      all SQL (schema the tables, ledger the missing seqs)  keyring  who may sign what
audit      every stored message re-verified (coverage the rows)  watch    verified messages, live
"""
