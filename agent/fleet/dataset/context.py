"""Drift context of a sample: the state of drift and the open alerts that its device had reported before it."""

from __future__ import annotations

import bisect
from typing import Any

from agent.fleet.database.datasets import retraining
from agent.fleet.database.interface import Connection


class LogContext:
    """Drift windows and alerts of a task in one log of a device, as they were before any of its messages."""

    def __init__(self, db: Connection, device: str, log: str, task: str) -> None:
        self._windows = retraining.load_drift(db, device, log, task)
        self._alerts = retraining.load_alerts(db, device, log, task)
        self._verdicts: dict[str, list[dict[str, str]]] = {}
        for identity, verdict, by, at in retraining.load_alert_verdicts(db, device, log):
            self._verdicts.setdefault(identity, []).append({"verdict": verdict, "by": by, "at": at})
        self._read, self._seq = 0, 0
        self._open: dict[str, dict[str, Any]] = {}

    def describe(self, seq: int, at: str) -> dict[str, Any]:
        """Return drift and open alerts before message `seq`, with verdicts on them given by the time `at`."""
        if seq < self._seq:
            self._read, self._open = 0, {}
        self._seq = seq
        while self._read < len(self._alerts) and self._alerts[self._read][0] < seq:
            _, identity, alert, subject, state = self._alerts[self._read]
            self._read += 1
            if state == "raised":
                self._open[identity] = {"id": identity, "alert": alert, "subject": subject}
            else:
                self._open.pop(identity, None)
        last = bisect.bisect_left(self._windows, seq, key=lambda window: window.seq)
        window = self._windows[last - 1] if last else None
        drift = None if window is None else {"state": window.state, "window": window.window, "to": window.to}
        return {"drift": drift, "open_alerts": [self._with_verdicts(alert, at) for alert in self._open.values()]}

    def _with_verdicts(self, alert: dict[str, Any], at: str) -> dict[str, Any]:
        given = [verdict for verdict in self._verdicts.get(alert["id"], ()) if verdict["at"] <= at]
        return {**alert, "verdicts": given} if given else alert
