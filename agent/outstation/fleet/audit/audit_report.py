"""Report of an audit: what it verified, and all that it found wrong."""

from __future__ import annotations

from typing import Any

import msgspec

from outstation.fleet.audit import rollouts
from outstation.fleet.audit.stored_rows import MessageKey

# Listed problems; all are counted. A database that was rewritten entirely must not fill the memory.
MAX_INVALID = 10_000


class AuditReport(msgspec.Struct):
    devices: int = 0
    messages: int = 0
    gaps: list[dict[str, Any]] = msgspec.field(default_factory=list)
    duplicates: int = 0
    invalid: list[dict[str, Any]] = msgspec.field(default_factory=list)
    invalid_count: int = 0
    invalid_devices: set[Any] = msgspec.field(default_factory=set)
    coverage: list[dict[str, Any]] = msgspec.field(default_factory=list)
    evicted: list[dict[str, Any]] = msgspec.field(default_factory=list)
    pruned: list[dict[str, Any]] = msgspec.field(default_factory=list)
    replaced_secrets: list[dict[str, Any]] = msgspec.field(default_factory=list)
    decisions: int = 0
    invalid_decisions: list[dict[str, Any]] = msgspec.field(default_factory=list)

    @property
    def passed(self) -> bool:
        undeclared = any(not gap["declared"] for gap in self.gaps)
        return not (self.duplicates or self.invalid_count or undeclared or self.invalid_decisions)

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `fleet audit --json`."""
        document = msgspec.structs.asdict(self)
        del document["invalid_devices"]
        for member in ("gaps", "coverage", "evicted", "pruned", "replaced_secrets"):
            document[member] = [
                {**entry, **{name: rollouts.to_json_value(entry[name]) for name in ("device", "log")}}
                for entry in document[member]
            ]
        return {"passed": self.passed, **document}

    def merge(self, other: AuditReport) -> None:
        """Add the report of other devices."""
        self.devices += other.devices
        self.messages += other.messages
        self.duplicates += other.duplicates
        self.invalid_count += other.invalid_count
        self.invalid_devices |= other.invalid_devices
        self.gaps += other.gaps
        self.coverage += other.coverage
        self.evicted += other.evicted
        self.pruned += other.pruned
        self.replaced_secrets += other.replaced_secrets
        self.invalid = [*self.invalid, *other.invalid][:MAX_INVALID]

    def add_invalid(self, key: MessageKey, reason: str) -> None:
        self.invalid_count += 1
        self.invalid_devices.add(key[0])
        if len(self.invalid) < MAX_INVALID:
            device, log, seq = map(rollouts.to_json_value, key)
            self.invalid.append({"device": device, "log": log, "seq": seq, "reason": reason})
