"""Presses of Home Assistant's buttons: a person confirms or corrects the newest answer of a task.

MQTT does not name the publisher of a message, so the broker's access rules decide who may press. A press does not name
the answer on the screen: one that arrives just after the answer changed is refused, as is a retained one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from outstation.foundation.errors import OutstationError
from outstation.integrations.homeassistant.device_state import Result
from outstation.integrations.homeassistant.discovery import CONFIRM, Place
from outstation.ml.performance.labels import MAX_LABEL
from outstation.protocol.transport.packets import IncomingMessage

# An answer that came so short ago may not have been the one on the screen.
SETTLE_S = 3.0
# Presses that are stored at once, and how many a second follow.
BURST, RATE = 30, 1.0
# Refusals that are reported within a minute, and characters of a name in a report: a topic may have 64 KiB.
MAX_REFUSALS, _WINDOW_S, _MAX_NAME = 20, 60.0, 64


class VerdictSink(Protocol):
    """Stores what was true of the result of a task at a row."""

    def __call__(self, device: str, task: str, row: int, label: str) -> str:
        """Return a sentence about what was stored. Raises OutstationError."""
        ...


class PressReader:
    """Reads presses, and gives each to the sink for the result that it means."""

    def __init__(self, place: Place, sink: VerdictSink, now_s: Callable[[], float] = time.monotonic) -> None:
        self._place, self._sink, self._now_s = place, sink, now_s
        # (device, task) → when its answer changed to the present one, and the answer before.
        self._changes: dict[tuple[str, str], tuple[float, str | None]] = {}
        self._budget, self._last_s = float(BURST), now_s()
        self._window_s, self._refusals = float("-inf"), 0

    def observe(self, device: str, task: str, before: Result | None, result: Result | None) -> None:
        """Record that the newest result of a task is another one."""
        if before is not None and result is not None and before.label != result.label:
            self._changes[device, task] = self._now_s(), before.label

    def forget(self, device: str) -> None:
        self._changes = {key: value for key, value in self._changes.items() if key[0] != device}

    def read(self, message: IncomingMessage, shown: Callable[[str, str], Result | None]) -> str:
        """Return a sentence about what a press did; "" if it was refused like many before it.

        `shown`: the result of a device's task that Home Assistant has.
        """
        target = self._place.parse_press(message.topic)
        if target is None:
            return self._refuse(f"message on {message.topic[:_MAX_NAME]!r}", "no button or label has this topic")
        device, task, is_label = target
        where = f"press for {task[:_MAX_NAME]} at {device[:_MAX_NAME]}"
        if message.retained:
            return self._refuse(where, "it is retained, so nobody pressed now")
        if not self._spend():
            return self._refuse(where, f"more than {BURST} presses came at once")
        result = shown(device, task)
        if result is None or result.label is None:
            return self._refuse(where, "no answer of this task is shown")
        text = message.payload.decode(errors="replace").strip() if is_label else result.label
        if not 0 < len(text) <= MAX_LABEL or (not is_label and message.payload != CONFIRM):
            return self._refuse(where, f"its payload is neither {CONFIRM.decode()!r} nor a label")
        changed_s, former = self._changes.get((device, task), (float("-inf"), None))
        if self._now_s() - changed_s < SETTLE_S:
            return self._refuse(where, f"the answer was {former!r} less than {SETTLE_S:g} s before; press again")
        try:
            return f"{where}: {self._sink(device, task, result.row, text)}"
        except OutstationError as error:
            return self._refuse(where, str(error))

    def _refuse(self, where: str, reason: str) -> str:
        """Return the sentence about a refusal, with the number of those without one; "" beyond the limit."""
        now_s, silent = self._now_s(), 0
        if now_s - self._window_s >= _WINDOW_S:
            silent, self._window_s, self._refusals = max(0, self._refusals - MAX_REFUSALS), now_s, 0
        self._refusals += 1
        if self._refusals > MAX_REFUSALS:
            return ""
        return f"{where} refused: {reason}" + (f" ({silent} more were refused before)" if silent else "")

    def _spend(self) -> bool:
        now_s = self._now_s()
        self._budget = min(float(BURST), self._budget + (now_s - self._last_s) * RATE)
        self._last_s = now_s
        if self._budget < 1.0:
            return False
        self._budget -= 1.0
        return True
