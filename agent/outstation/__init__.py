"""Outstation: an agent for edge hardware that buffers readings, runs models over them and reports signed results.

Two flows, each in one direction::

    device   source → intake → store ──→ batch: take → features → invoke → judge ──→ store ──→ uplink → broker
    fleet    broker → receive → verify → store → acknowledge ;  store → merge → watch / audit

A producer is acknowledged after its rows are committed. A batch commits its results, drift state, alerts, cursor and
outgoing messages in one transaction. An outgoing message is deleted once the collector's signed acknowledgement says
it is durable there.

    wire/     what crosses the air, used by both sides        drift/   reference, summary, detectors (pure numpy)
    model/    bundle, runtime, features, probe                link.py  the MQTT connection
    device/   store, intake, batch, schedule, uplink, daemon  fleet/   store, collect, audit, watch
    simulate/, cli/
"""

__version__ = "0.1.0"
