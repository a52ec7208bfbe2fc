"""Token buckets of a device at the collector."""

from __future__ import annotations

import pytest

from outstation.fleet.collector.quota import REFILL_S, DeviceQuotas, Quota

pytestmark = pytest.mark.attack("floods")

ENROLLED = frozenset({"pi-07", "pi-08"})
QUOTA = Quota(messages_per_s=2.0, bytes_per_s=1000, burst_s=50.0)


def admitted(quotas: DeviceQuotas, n: int, now_s: float, device: str = "pi-07", size: int = 1) -> int:
    return sum(quotas.admit(device, size, ENROLLED, now_s) for _ in range(n))


def test_a_burst_is_taken_then_the_bucket_refills_before_it_gives_again() -> None:
    quotas = DeviceQuotas(QUOTA)
    assert admitted(quotas, 1000, 0.0) == 100
    assert admitted(quotas, 1000, REFILL_S - 0.5) == 0
    assert admitted(quotas, 1000, REFILL_S) == 20
    assert admitted(quotas, 1000, 1e6) == 100, "never more than the burst"


@pytest.mark.attack("floods", control=True)
def test_without_a_quota_all_of_a_flood_is_taken() -> None:
    assert admitted(DeviceQuotas(Quota(messages_per_s=1e9)), 10_000, 0.0) == 10_000


def test_collectors_that_share_messages_grant_no_more_than_one_alone() -> None:
    group = [DeviceQuotas(QUOTA) for _ in range(4)]
    for quotas in group:
        quotas.collector_count = len(group)
    assert sum(admitted(quotas, 1000, 0.0) for quotas in group) == 100
    assert sum(admitted(quotas, 1000, REFILL_S) for quotas in group) == 20
    group[0].collector_count = 1
    assert admitted(group[0], 1000, 1e6) == 100, "the others have stopped"


def test_bytes_count_as_well() -> None:
    quotas = DeviceQuotas(QUOTA)
    assert admitted(quotas, 90, 0.0, size=10_000) == 5


def test_a_flood_uses_up_no_other_devices_quota() -> None:
    quotas = DeviceQuotas(QUOTA)
    admitted(quotas, 1000, 0.0)
    assert admitted(quotas, 50, 0.0, device="pi-08") == 50


def test_a_refunded_message_costs_nothing() -> None:
    quotas = DeviceQuotas(QUOTA)
    for _ in range(1000):
        assert quotas.admit("pi-07", 10, ENROLLED, 0.0)
        quotas.refund("pi-07", 10)


def test_invented_names_take_no_memory() -> None:
    quotas = DeviceQuotas(QUOTA)
    assert all(quotas.admit(f"made-up-{i}", 1, ENROLLED, 0.0) for i in range(1000))
    assert quotas._buckets == {}
