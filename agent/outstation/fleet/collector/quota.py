"""Quotas of messages and bytes of each device at a collector: token buckets.

A message over quota is neither stored nor acknowledged, so it stays on the device, which sends it again. Messages of
other devices are not affected.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import msgspec

from outstation.foundation.config.toml_files import Section

# After it ran empty, a bucket refills for this time before it grants a message: runs of messages then pass whole, and a
# flood is dropped cheaply.
REFILL_S = 10.0


class Quota(Section, frozen=True):
    """Limits of what a collector takes from [one device](../guides/collector.md#quotas).

    ```toml
    [quota]
    messages_per_s = 20
    bytes_per_s = 65536
    ```
    """

    messages_per_s: Annotated[float, msgspec.Meta(gt=0)] = 200.0
    """Messages a second."""
    bytes_per_s: Annotated[int, msgspec.Meta(gt=0)] = 262_144
    """Bytes a second."""
    burst_s: Annotated[float, msgspec.Meta(ge=1)] = 1000.0
    """Seconds of both that may come at once, after an outage."""


class _Bucket(msgspec.Struct):
    """Messages and bytes that a device may still send; `updated_s` of the boot clock."""

    messages: float
    size: float
    updated_s: float
    is_open: bool = True


class DeviceQuotas:
    """Buckets of the enrolled devices that sent something: invented names cost no memory.

    Collectors that share the messages each grant their part: the broker hands them a device's messages in turn.
    """

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self.collector_count = 1
        self._buckets: dict[str, _Bucket] = {}

    def admit(self, device: str, size: int, enrolled: Collection[str], now_s: float) -> bool:
        """Take one message of `size` bytes from the device's bucket. Return False if it is empty.

        A name that is not enrolled has no quota: no key verifies its messages, so none is stored.
        """
        if device not in enrolled:
            return True
        bucket = self._buckets.get(device)
        if bucket is None:
            messages_per_s, bytes_per_s = self._rates
            burst_s = self._quota.burst_s
            bucket = self._buckets[device] = _Bucket(messages_per_s * burst_s, bytes_per_s * burst_s, now_s)
        self._refill(bucket, now_s)
        if bucket.is_open:
            bucket.messages -= 1
            bucket.size -= size
        return bucket.is_open

    def refund(self, device: str, size: int) -> None:
        """Give back what was taken for a message that may be another sender's."""
        if bucket := self._buckets.get(device):
            bucket.messages += 1
            bucket.size += size

    @property
    def _rates(self) -> tuple[float, float]:
        """Messages and bytes a second that this collector grants a device."""
        return self._quota.messages_per_s / self.collector_count, self._quota.bytes_per_s / self.collector_count

    def _refill(self, bucket: _Bucket, now_s: float) -> None:
        (messages_per_s, bytes_per_s), burst_s = self._rates, self._quota.burst_s
        passed_s = now_s - bucket.updated_s
        bucket.messages = min(bucket.messages + messages_per_s * passed_s, messages_per_s * burst_s)
        bucket.size = min(bucket.size + bytes_per_s * passed_s, bytes_per_s * burst_s)
        bucket.updated_s = now_s
        if bucket.messages < 1 or bucket.size <= 0:
            bucket.is_open = False
        elif not bucket.is_open:
            refill_s = min(REFILL_S, burst_s)
            bucket.is_open = bucket.messages >= messages_per_s * refill_s and bucket.size >= bytes_per_s * refill_s
