"""Whether the machine had better rest: too hot, held back by its own firmware, or on a battery that runs low.

Sources: Linux sysfs, Documentation/ABI/testing/sysfs-class-thermal and sysfs-class-power; the Raspberry Pi firmware's
`get_throttled` (bit 0 under-voltage, 2 throttled, 3 soft temperature limit, each as it is now).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

from agent import config
from agent.clock import Now

log = logging.getLogger("outstation")

_LOOK_S = 10.0
# A rest ends this much on the good side of where it began: else it would begin anew with each batch.
_COOLER, _FULLER = 5.0, 5.0
# °C; some sensors of some boards say 0, or a number of the driver's own, for ever.
_PLAUSIBLE = (0.0, 200.0)
_THROTTLED = Path("devices/platform/soc/soc:firmware/get_throttled")
_HELD_BACK = {0x1: "its supply voltage is too low", 0x4: "it is throttled", 0x8: "it is at its soft temperature limit"}


class Condition(msgspec.Struct, frozen=True):
    """°C of the hottest sensor, % of the emptiest battery that is being emptied; None where nothing tells.

    `resting`: why tasks wait, "" where they do not.
    """

    temperature: float | None = None
    battery: float | None = None
    resting: str = ""

    def shown(self) -> dict[str, object]:
        """Members for health and status; none where nothing tells."""
        members = {"temperature": self.temperature, "battery": self.battery, "resting": self.resting or None}
        return {name: value for name, value in members.items() if value is not None}


class Care:
    """Looks every ten seconds at most. `root` is where sysfs is."""

    def __init__(self, conf: config.Care, root: Path = Path("/sys")) -> None:
        self._conf, self._root = conf, root
        self.condition = Condition()
        self._look_at_s = float("-inf")

    def turn(self, now: Now) -> Condition:
        if now.boot_s < self._look_at_s:
            return self.condition
        self._look_at_s = now.boot_s + _LOOK_S
        before = self.condition
        found = Condition(self._temperature(), self._battery())
        self.condition = Condition(found.temperature, found.battery, self._reason(found, resting=bool(before.resting)))
        if bool(before.resting) != bool(self.condition.resting):
            after = self.condition.resting
            log.warning("tasks %s", f"wait: {after}" if after else f"go on; they waited because: {before.resting}")
        return self.condition

    def _reason(self, found: Condition, *, resting: bool) -> str:
        hottest = self._conf.max_temperature - (_COOLER if resting else 0.0)
        if found.temperature is not None and found.temperature > hottest:
            most = self._conf.max_temperature
            limits = f"more than {most:g} °C ([care] max_temperature), until {most - _COOLER:g} °C"
            return f"{found.temperature:.0f} °C; {limits}"
        emptiest = self._conf.min_battery + (_FULLER if resting else 0.0)
        if found.battery is not None and found.battery < emptiest:
            least = self._conf.min_battery
            limits = f"less than {least:g} % ([care] min_battery), until {least + _FULLER:g} %"
            return f"battery at {found.battery:.0f} %; {limits}"
        return self._held_back() if self._conf.throttled == "wait" else ""

    def _temperature(self) -> float | None:
        found = [value / 1000 for value in self._numbers("class/thermal/thermal_zone*/temp")]
        return max((one for one in found if _PLAUSIBLE[0] < one < _PLAUSIBLE[1]), default=None)

    def _battery(self) -> float | None:
        levels = []
        for supply in self._root.glob("class/power_supply/*"):
            if self._text(supply / "type") == "Battery" and self._text(supply / "status") == "Discharging":
                with contextlib.suppress(ValueError):
                    levels.append(float(self._text(supply / "capacity")))
        return min((one for one in levels if 0.0 <= one <= 100.0), default=None)

    def _held_back(self) -> str:
        try:
            bits = int(self._text(self._root / _THROTTLED), 16)
        except ValueError:
            return ""
        told = [what for bit, what in _HELD_BACK.items() if bits & bit]
        return f"the firmware holds the processor back: {', '.join(told)}" if told else ""

    def _numbers(self, pattern: str) -> Iterator[float]:
        for path in self._root.glob(pattern):
            with contextlib.suppress(ValueError):
                yield float(self._text(path))

    @staticmethod
    def _text(path: Path) -> str:
        """Empty where it cannot be read: a sensor may refuse, or go, at any moment."""
        try:
            return path.read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            return ""


def step_back(conf: config.Care) -> None:
    """Give this thread, which runs the models, a lower priority than those that take and send, and than the machine."""
    try:
        # On Linux both are a thread's own; 0 is the calling one. Where a service manager has set them, as Nice= of our
        # unit does, it may have forbidden to set them again.
        if os.getpriority(os.PRIO_PROCESS, 0) < conf.nice:
            os.setpriority(os.PRIO_PROCESS, 0, conf.nice)
        lowest = (psutil.IOPRIO_CLASS_BE, 7)
        if psutil.Process().ionice() != lowest:
            psutil.Process().ionice(*lowest)
    except (OSError, psutil.Error) as error:
        log.warning("[care] nice: %s; models keep the priority they have: set Nice= of the service instead", error)
