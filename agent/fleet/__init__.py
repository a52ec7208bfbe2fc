"""The fleet side: enrols devices, collects what they sign, proves that nothing is lost.

    broker → collect: receive → verify → store → acknowledge          store → audit, watch, reports

config     fleet.toml                       collect      the collector's loop
enrol      a fleet's and a device's files   acknowledge  signed acknowledgements on their way out
pki        certificates (revocation: ended) ingest       one transaction of messages (ledger: gaps, unfold: rows)
mosquitto  the broker's config and ACL      store        all SQL (schema: its tables)
keyring    who may sign                     audit        every stored message verified again (coverage: its rows)
text       safe to print                    watch        verified messages, live (screen: on a terminal)
durable    files whole or not at all
"""
