"""What happened to a store lately, for people: how it was left, what was salvaged, what lies in quarantine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from agent.device.recovery import findings, salvage
from agent.device.store.store import Store


class Condition(msgspec.Struct, frozen=True):
    """`stop`: how the last process that wrote here ended, `clean` or `unclean`.

    `last`: {"time", "what", "quarantine"} of the last finding.
    """

    stop: str
    last: dict[str, Any] | None
    quarantine: Path | None
    quarantine_bytes: int

    @property
    def document(self) -> dict[str, Any]:
        quarantine = {"folder": str(self.quarantine), "bytes": self.quarantine_bytes} if self.quarantine else None
        return {"stop": self.stop, "last": self.last, "quarantine": quarantine}

    def __str__(self) -> str:
        parts = [f"last stop {self.stop}" if self.stop else "never stopped yet"]
        if self.last:
            parts.append(f"{self.last['time']}: {self.last['what']}")
        if self.quarantine:
            parts.append(f"{self.quarantine} holds {self.quarantine_bytes / 2**20:.1f} MiB; delete it when looked at")
        return "; ".join(parts)


def condition(store: Store) -> Condition:
    """Of `store`, whoever has it open to write."""
    folder = store.path.parent
    if store.meta(findings.CLEAN, ""):
        stop = "clean"
    else:
        stop = store.meta(findings.STOP, "") if _is_open(folder / "lock") else "unclean"
    last = store.meta(findings.LAST, "")
    place = folder / salvage.QUARANTINE
    sizes = [path.stat().st_size for path in place.rglob("*") if path.is_file()]
    return Condition(stop, json.loads(last) if last else None, place if sizes else None, sum(sizes))


def _is_open(lock: Path) -> bool:
    """Whether a process holds the lock; without touching it, so that nobody who wants it is turned away."""
    try:
        inode = lock.stat().st_ino
        return any(f":{inode} " in line for line in Path("/proc/locks").read_text(encoding="ascii").splitlines())
    except OSError:
        return False
