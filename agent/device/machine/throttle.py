"""Throttle: pauses tasks while the machine is too hot, throttled by its firmware, or on a low battery.

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
from agent.clock import ClockReading

log = logging.getLogger("outstation")

_CHECK_INTERVAL_S = 10.0
# Hysteresis in °C and %: without it, each batch would begin another pause.
_TEMPERATURE_HYSTERESIS, _BATTERY_HYSTERESIS = 5.0, 5.0
# °C; sensors of some boards always read 0, or an error code of the driver.
_PLAUSIBLE_TEMPERATURES = (0.0, 200.0)
_GET_THROTTLED_PATH = Path("devices/platform/soc/soc:firmware/get_throttled")
_THROTTLE_FLAGS = {
    0x1: "its supply voltage is too low",
    0x4: "it is throttled",
    0x8: "it is at its soft temperature limit",
}


class ThermalPowerStatus(msgspec.Struct, frozen=True):
    """Temperature of the hottest sensor (°C) and level of the emptiest discharging battery (%); None if unknown.

    `pause_reason`: why tasks are paused, "" if they are not.
    """

    temperature: float | None = None
    battery: float | None = None
    pause_reason: str = ""

    def to_dict(self) -> dict[str, object]:
        """Return the known members for health and status."""
        members = {"temperature": self.temperature, "battery": self.battery, "resting": self.pause_reason or None}
        return {name: value for name, value in members.items() if value is not None}


class Throttle:
    """Throttle of all tasks; reads the sensors every ten seconds at most. `root` is the sysfs mount."""

    def __init__(self, conf: config.ThrottleConfig, root: Path = Path("/sys")) -> None:
        self._conf, self._root = conf, root
        self.status = ThermalPowerStatus()
        self._next_check_s = float("-inf")

    def tick(self, now: ClockReading) -> ThermalPowerStatus:
        if now.boot_s < self._next_check_s:
            return self.status
        self._next_check_s = now.boot_s + _CHECK_INTERVAL_S
        before = self.status
        measured = ThermalPowerStatus(self._read_temperature(), self._read_battery())
        reason = self._find_pause_reason(measured, is_paused=bool(before.pause_reason))
        self.status = ThermalPowerStatus(measured.temperature, measured.battery, reason)
        if bool(before.pause_reason) != bool(self.status.pause_reason):
            after = self.status.pause_reason
            log.warning("tasks %s", f"pause: {after}" if after else f"resume; the cause was: {before.pause_reason}")
        return self.status

    def _find_pause_reason(self, measured: ThermalPowerStatus, *, is_paused: bool) -> str:
        hottest = self._conf.max_temperature - (_TEMPERATURE_HYSTERESIS if is_paused else 0.0)
        if measured.temperature is not None and measured.temperature > hottest:
            most = self._conf.max_temperature
            limits = f"more than {most:g} °C ([throttle] max_temperature), until {most - _TEMPERATURE_HYSTERESIS:g} °C"
            return f"{measured.temperature:.0f} °C; {limits}"
        emptiest = self._conf.min_battery + (_BATTERY_HYSTERESIS if is_paused else 0.0)
        if measured.battery is not None and measured.battery < emptiest:
            least = self._conf.min_battery
            limits = f"less than {least:g} % ([throttle] min_battery), until {least + _BATTERY_HYSTERESIS:g} %"
            return f"battery at {measured.battery:.0f} %; {limits}"
        return self._describe_throttling() if self._conf.throttled == "wait" else ""

    def _read_temperature(self) -> float | None:
        low, high = _PLAUSIBLE_TEMPERATURES
        readings = (value / 1000 for value in self._read_numbers("class/thermal/thermal_zone*/temp"))
        return max((reading for reading in readings if low < reading < high), default=None)

    def _read_battery(self) -> float | None:
        levels = []
        for supply in self._root.glob("class/power_supply/*"):
            if self._read_text(supply / "type") == "Battery" and self._read_text(supply / "status") == "Discharging":
                with contextlib.suppress(ValueError):
                    levels.append(float(self._read_text(supply / "capacity")))
        return min((level for level in levels if 0.0 <= level <= 100.0), default=None)

    def _describe_throttling(self) -> str:
        try:
            bits = int(self._read_text(self._root / _GET_THROTTLED_PATH), 16)
        except ValueError:
            return ""
        causes = [cause for bit, cause in _THROTTLE_FLAGS.items() if bits & bit]
        return f"the firmware throttles the processor: {', '.join(causes)}" if causes else ""

    def _read_numbers(self, pattern: str) -> Iterator[float]:
        for path in self._root.glob(pattern):
            with contextlib.suppress(ValueError):
                yield float(self._read_text(path))

    @staticmethod
    def _read_text(path: Path) -> str:
        """Read a file of sysfs; empty if it cannot be read: a sensor may fail or disappear at any moment."""
        try:
            return path.read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            return ""


def lower_priority(conf: config.ThrottleConfig) -> None:
    """Lower the priority of this thread, which runs the models, below intake, uplink and other programs."""
    try:
        # On Linux both belong to a thread; 0 is the calling one. A service manager that sets them, as Nice= of our unit
        # does, may have forbidden further changes.
        if os.getpriority(os.PRIO_PROCESS, 0) < conf.nice:
            os.setpriority(os.PRIO_PROCESS, 0, conf.nice)
        lowest = (psutil.IOPRIO_CLASS_BE, 7)
        if psutil.Process().ionice() != lowest:
            psutil.Process().ionice(*lowest)
    except (OSError, psutil.Error) as error:
        log.warning("[throttle] nice: %s; models keep their priority; set Nice= of the service instead", error)
