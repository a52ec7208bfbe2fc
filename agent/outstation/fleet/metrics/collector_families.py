"""Metric families of one collector: what it received, refused, and has not stored yet."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from outstation.fleet.collector.quota import Quota
from outstation.fleet.collector.statistics import CollectorStatistics
from outstation.fleet.metrics.device_families import bound_reasons
from outstation.foundation import clock

_LABELS = ("fleet", "collector")


def build_families(fleet: str, collector: str, statistics: CollectorStatistics, quota: Quota) -> Iterator[Metric]:
    """Yield the families; `collector` is the name of --share, "" for a single one. Call from any thread."""
    labels = (fleet, collector)

    def gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"outstation_collector_{name}", help_text, labels=_LABELS)
        family.add_metric(labels, value)
        return family

    messages = CounterMetricFamily(
        "outstation_collector_messages", "Verified messages by outcome.", labels=(*_LABELS, "outcome")
    )
    for outcome, count in sorted(statistics.outcomes.items()):
        messages.add_metric((*labels, outcome), count)
    refused = CounterMetricFamily(
        "outstation_collector_refused_messages", "Refused messages by reason.", labels=(*_LABELS, "reason")
    )
    for reason, count in bound_reasons(dict(statistics.refusals)).items():
        refused.add_metric((*labels, reason), count)
    failures = CounterMetricFamily(
        "outstation_collector_storage_failures", "Batches that the database did not take.", labels=_LABELS
    )
    failures.add_metric(labels, statistics.storage_failures)
    waiting_since = statistics.waiting_since_s
    lag_s = max(0.0, clock.boot_seconds() - waiting_since) if waiting_since is not None else 0.0
    yield from (messages, refused, failures)
    yield gauge("connected", "1 if the collector is connected to the broker.", float(statistics.is_connected))
    yield gauge("held_messages", "Messages received and not stored yet.", statistics.held)
    yield gauge("ingest_lag_seconds", "Time since when a received message waits for the database.", lag_s)
    yield gauge("quota_messages_per_second", "Messages a second that one device may send.", quota.messages_per_s)
    yield gauge("quota_bytes_per_second", "Bytes a second that one device may send.", quota.bytes_per_s)
