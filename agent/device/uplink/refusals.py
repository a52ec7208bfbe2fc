"""What came from the broker and was not obeyed: counted by reason, and one alert for somebody to look.

Whoever reaches the broker can send a million forged commands or acknowledgements. They must not wear out the card, fill
the outbox or the journal, nor take memory: counts are written once a minute, and the alert is raised once and cleared
after an hour without any.
"""

from __future__ import annotations

import logging
from collections import Counter

from agent.clock import Now
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.errors import Refused, StorageFull

log = logging.getLogger("outstation.uplink")

ACKNOWLEDGEMENTS, COMMANDS, DESIRED = "acknowledgements", "commands", "desired states"
QUIET_S = 3600.0
_COUNT_S = 60.0
_FULL_RETRY_S = 5.0
_RAISED = "refusals alert"
_ID = "_device/security/refused"
# What an honest collector or operator can cause: one that was restored, a store that began a new log, a burst.
_HONEST = frozenset({"other log", "beyond the log", "busy", "no key"})


class Refusals:
    """Those of one device. Used by the uplink's thread only."""

    def __init__(self, store: Store, author: Author) -> None:
        self._store, self._author = store, author
        self._counts: Counter[str] = Counter()
        self._hostile = self._reported = 0
        self._last = ""
        self._raised = store.meta(_RAISED, "") != ""
        self._quiet_from: float | None = None
        self._count_at = self._tell_at = self._full_until = float("-inf")

    def add(self, what: str, refusal: Refused, now: Now) -> None:
        """Note one of `what` that was refused."""
        self._counts[f"{what} refused"] += 1
        self._counts[f"{what} refused: {refusal.reason}"] += 1
        if refusal.reason not in _HONEST:
            self._hostile += 1
            self._last = f"{what}: {refusal.reason}"
            self._quiet_from = now.boot_s
        if now.boot_s >= self._tell_at:
            self._tell_at = now.boot_s + _COUNT_S
            log.warning("%s refused, nothing changes: %s", what, refusal)

    def flush(self, now: Now, *, at_once: bool = False) -> None:
        """Write counts and raise or clear the alert, if it is time to. A full disk delays it. Raises StorageError."""
        if self._quiet_from is None:
            self._quiet_from = now.boot_s
        raises = self._hostile > self._reported and not self._raised
        clears = self._raised and self._hostile == self._reported and now.boot_s - self._quiet_from >= QUIET_S
        counts = bool(self._counts) and (at_once or now.boot_s >= self._count_at)
        if not (raises or clears or counts) or now.boot_s < self._full_until:
            return
        try:
            self._write(now, raises, clears)
        except StorageFull as full:
            log.warning("%s; the count of what was refused waits", full)
            self._full_until = now.boot_s + _FULL_RETRY_S
            return
        self._raised = (self._raised or raises) and not clears
        self._reported = self._hostile
        self._count_at = now.boot_s + _COUNT_S
        self._counts.clear()

    def _write(self, now: Now, raises: bool, clears: bool) -> None:
        with self._store.transaction(vital=True) as tx:
            for name, n in self._counts.items():
                tx.count(name, n)
            if raises or clears:
                tx.set_meta(_RAISED, "1" if raises else "")
                self._author.write(tx, "alerts", None, self._alert(raises), now)

    def _alert(self, raised: bool) -> dict[str, object]:
        summary = (
            f"Somebody sends this device what does not verify, the last one was refused for {self._last}; nothing of "
            "it was obeyed. Look who may publish on its topics; the counters in `outstation status` go on."
            if raised
            else f"For {QUIET_S / 3600:.0f} h nothing came that does not verify."
        )
        head = {"alert": "security", "subject": "refused", "state": "raised" if raised else "cleared"}
        severity = "critical" if raised else "info"
        return {**head, "severity": severity, "id": _ID, "summary": summary, "evidence": {"last": self._last}}
