"""Power of the machine, where it can measure it: PMIC of the Pi 5, a monitor such as the INA219, or a battery."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec

_PMIC_COMMAND = ("vcgencmd", "pmic_read_adc")
_PMIC_TIMEOUT_S = 5.0
# `VDD_CORE_A current(7)=1.23456000A`, and the same rail as `VDD_CORE_V volt(15)=0.72000000V`.
_PMIC_LINE = re.compile(r"(\w+)_([AV]) (?:current|volt)\(\d+\)=([0-9.]+)[AV]")
_MONITORS = ("ina219", "ina220", "ina226", "ina230", "ina231", "ina237", "ina238", "ina3221", "ina260")
UNKNOWN = (
    "this machine cannot tell its power: no PMIC that vcgencmd reads (Raspberry Pi 5), no INA219 or other monitor in "
    "/sys/class/hwmon, and no battery that reports it; measure it at the plug"
)


class Power(msgspec.Struct, frozen=True):
    """Power in W by one way of measuring it, and what that covers."""

    watts: float
    source: str


def run_pmic() -> str:
    """Read the power supply chip by the Pi's firmware; return "" on any other machine."""
    try:
        done = subprocess.run(_PMIC_COMMAND, capture_output=True, text=True, timeout=_PMIC_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def measure(root: Path = Path("/sys"), read_pmic: Callable[[], str] = run_pmic) -> list[Power]:
    """Return the power now, by each way that this machine has; `root` is the sysfs mount."""
    measured = [_from_pmic(read_pmic()), *map(_from_monitor, sorted(root.glob("class/hwmon/hwmon*")))]
    measured += map(_from_battery, sorted(root.glob("class/power_supply/*")))
    return [power for power in measured if power is not None]


def _from_pmic(text: str) -> Power | None:
    rails: dict[str, dict[str, float]] = {}
    for name, kind, number in _PMIC_LINE.findall(text):
        rails.setdefault(name, {})[kind] = float(number)
    watts = sum(rail["A"] * rail["V"] for rail in rails.values() if len(rail) == 2)
    scope = "the Pi's PMIC: its rails, without USB devices and the loss of the converter"
    return Power(watts, scope) if watts else None


def _from_monitor(folder: Path) -> Power | None:
    name = _read(folder / "name")
    if name not in _MONITORS:
        return None
    if (power := _read_number(folder / "power1_input")) is not None:
        return Power(power / 1e6, f"{name} at {folder.name}")
    # For chips without a product, from mV and mA.
    voltage, current = (_read_number(folder / file) for file in ("in1_input", "curr1_input"))
    return None if voltage is None or current is None else Power(voltage * current / 1e6, f"{name} at {folder.name}")


def _from_battery(folder: Path) -> Power | None:
    if _read(folder / "type") != "Battery":
        return None
    scope = f"battery {folder.name}, {_read(folder / 'status').lower() or 'in unknown state'}"
    if (power := _read_number(folder / "power_now")) is not None:
        return Power(abs(power) / 1e6, scope)
    voltage, current = (_read_number(folder / file) for file in ("voltage_now", "current_now"))
    return None if voltage is None or current is None else Power(abs(voltage * current) / 1e12, scope)


def _read(path: Path) -> str:
    """Read a file of sysfs; empty if it cannot be read: a sensor may fail or disappear at any moment."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _read_number(path: Path) -> float | None:
    try:
        return float(_read(path))
    except ValueError:
        return None
