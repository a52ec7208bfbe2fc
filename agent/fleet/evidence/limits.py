"""How much an evidence folder holds, and how much of one is read. What is left out is counted and said."""

from __future__ import annotations

import msgspec


class WriteLimits(msgspec.Struct, frozen=True):
    """Of each that goes into a folder; the worst or the newest stay."""

    incidents: int = 2000
    decisions: int = 5000
    messages: int = 60_000
    message_bytes: int = 256 << 20
    running_tasks: int = 20_000
    accuracy_entries: int = 5000
    models: int = 1000
    # Tasks of devices that are remembered on the way, and names of events that are counted each.
    tasks: int = 100_000
    event_names: int = 200
    drift_onsets: int = 500
    bundles: int = 200
    # Of one device, roll-out and pair of bundles as many as a device itself judges by; and how many of these.
    messages_per_comparison: int = 64
    comparisons: int = 1000
    # Alerts of one log that are open at once; an honest device has a few.
    open_alerts: int = 1000
    # Of one part of messages/.
    part_messages: int = 2000
    part_bytes: int = 32 << 20


class ReadLimits(msgspec.Struct, frozen=True):
    """Of a folder that somebody else made. Sizes in bytes."""

    files: int = 4096
    messages: int = 200_000
    manifest_bytes: int = 16 << 20
    token_bytes: int = 4096
    # A file that is parsed line by line, and one line of it: a payload of a megabyte, escaped.
    line_bytes: int = 8 << 20
    file_bytes: int = 1 << 30
    total_bytes: int = 4 << 30
    # What is read whole.
    document_bytes: int = 32 << 20
    problems: int = 500
    metadata_bytes: int = 4 << 20


WRITE_LIMITS = WriteLimits()
READ_LIMITS = ReadLimits()
