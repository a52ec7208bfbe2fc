"""Throttle: slows tasks down, then pauses them, while the machine is hot or on a low battery.

A slowed machine runs tasks for a share of the time, the duty cycle: heat falls even while a backlog waits.

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

from outstation.device import config
from outstation.foundation.clock import ClockReading

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

    `pause_reason`: why tasks are paused, "" if they are not; `slow_reason`: why they are slowed down.
    """

    temperature: float | None = None
    battery: float | None = None
    pause_reason: str = ""
    slow_reason: str = ""

    def to_dict(self) -> dict[str, object]:
        """Return the known members for health and status."""
        members = {
            "temperature": self.temperature,
            "battery": self.battery,
            "resting": self.pause_reason or None,
            "slowed": self.slow_reason or None,
        }
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
        before, conf = self.status, self._conf
        temperature, battery = self._read_temperature(), self._read_battery()
        pause_limits = (conf.max_temperature, "max_temperature"), (conf.min_battery, "min_battery")
        reason = _compare_limits(temperature, battery, *pause_limits, is_beyond=bool(before.pause_reason))
        if not reason and conf.throttled == "wait":
            reason = self._describe_throttling()
        slow_limits = (conf.slow_temperature, "slow_temperature"), (conf.slow_battery, "slow_battery")
        # After a pause tasks begin slowly, or they would heat the machine up to the next one.
        was_slow = bool(before.slow_reason or before.pause_reason)
        slow = "" if reason else _compare_limits(temperature, battery, *slow_limits, is_beyond=was_slow)
        self.status = ThermalPowerStatus(temperature, battery, reason, slow)
        _log_change("pause", before.pause_reason, reason)
        # Tasks that pause do not run at full speed again.
        if not reason:
            _log_change("slow down", before.slow_reason, slow)
        return self.status

    def rest_s(self, busy_s: float) -> float:
        """Return how long all tasks rest after they ran for `busy_s` seconds: 0 unless slowed down."""
        return busy_s * (1.0 / self._conf.duty_cycle - 1.0) if self.status.slow_reason else 0.0

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


def _compare_limits(
    temperature: float | None,
    battery: float | None,
    most: tuple[float, str],
    least: tuple[float, str],
    *,
    is_beyond: bool,
) -> str:
    """Return which of the limits, each with its config key, is passed; one that `is_beyond` ends with hysteresis."""
    limit, key = most
    end = limit - _TEMPERATURE_HYSTERESIS
    if temperature is not None and temperature > (end if is_beyond else limit):
        was = "" if temperature > limit else "was "
        return f"{temperature:.0f} °C; {was}more than {limit:g} °C ([throttle] {key}), until {end:g} °C"
    limit, key = least
    end = limit + _BATTERY_HYSTERESIS
    if battery is not None and battery < (end if is_beyond else limit):
        was = "" if battery < limit else "was "
        return f"battery at {battery:.0f} %; {was}less than {limit:g} % ([throttle] {key}), until {end:g} %"
    return ""


def _log_change(action: str, before: str, after: str) -> None:
    if bool(before) != bool(after):
        log.warning("tasks %s", f"{action}: {after}" if after else f"no longer {action}; the cause was: {before}")


def lower_priority(conf: config.ThrottleConfig) -> None:
    """Lower the priority of this thread, which runs the models, below intake, uplink and other programs."""
    # Only the daemon needs it.
    import psutil

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
