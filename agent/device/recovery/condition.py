"""What happened to a store lately, for people: how it was left, what was salvaged, what lies in quarantine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from agent.device.recovery import findings, salvage
from agent.device.store.store import Store


class StoreCondition(msgspec.Struct, frozen=True):
    """`stop`: how the last process that wrote here ended, `clean` or `unclean`.

    `last`: {"time", "what", "quarantine"} of the last finding.
    """

    last_stop: str
    last_finding: dict[str, Any] | None
    quarantine: Path | None
    quarantine_bytes: int

    @property
    def document(self) -> dict[str, Any]:
        quarantine = {"folder": str(self.quarantine), "bytes": self.quarantine_bytes} if self.quarantine else None
        return {"stop": self.last_stop, "last": self.last_finding, "quarantine": quarantine}

    def __str__(self) -> str:
        parts = [f"last stop {self.last_stop}" if self.last_stop else "never stopped yet"]
        if self.last_finding:
            parts.append(f"{self.last_finding['time']}: {self.last_finding['what']}")
        if self.quarantine:
            parts.append(f"{self.quarantine} holds {self.quarantine_bytes / 2**20:.1f} MiB; delete it when looked at")
        return "; ".join(parts)


def inspect_condition(store: Store) -> StoreCondition:
    """Of `store`, whoever has it open to write."""
    folder = store.path.parent
    if store.get_meta(findings.CLEAN_STOP, ""):
        stop = "clean"
    else:
        stop = store.get_meta(findings.LAST_STOP, "") if _is_lock_held(folder / "lock") else "unclean"
    last = store.get_meta(findings.LAST_FINDING, "")
    place = folder / salvage.QUARANTINE
    sizes = [path.stat().st_size for path in place.rglob("*") if path.is_file()]
    return StoreCondition(stop, json.loads(last) if last else None, place if sizes else None, sum(sizes))


def _is_lock_held(lock: Path) -> bool:
    """Whether a process holds the lock; without touching it, so that nobody who wants it is turned away."""
    try:
        inode = lock.stat().st_ino
        return any(f":{inode} " in line for line in Path("/proc/locks").read_text(encoding="ascii").splitlines())
    except OSError:
        return False
