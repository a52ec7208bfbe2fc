"""Throttle: tasks pause on a hot or throttled machine or a low battery, with a reason, and resume by themselves."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil
import pytest

from outstation.device import config
from outstation.device.machine import throttle
from outstation.device.machine.throttle import Throttle
from outstation.foundation import clock


def at(boot_s: float) -> clock.ClockReading:
    return clock.ClockReading(1_764_022_680_000_000, boot_s, "synced")


class Machine:
    """A sysfs of its own, looked at every ten seconds of a clock that is set."""

    def __init__(self, root: Path, **conf: float | str) -> None:
        self.root, self._now = root, 1000.0
        self._care = Throttle(config.ThrottleConfig(**conf), root)  # type: ignore[arg-type]

    def put(self, path: str, text: str) -> Machine:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text + "\n")
        return self

    def battery(self, percent: str, status: str) -> Machine:
        for name, text in (("type", "Battery"), ("capacity", percent), ("status", status)):
            self.put(f"class/power_supply/BAT0/{name}", text)
        return self

    def resting(self) -> str:
        self._now += 10.0
        return self._care.tick(at(self._now)).pause_reason

    @property
    def status(self) -> throttle.ThermalPowerStatus:
        return self._care.status

    def shown(self) -> dict[str, object]:
        self._now += 10.0
        return self._care.tick(at(self._now)).to_dict()


def test_the_hottest_sensor_counts_with_hysteresis(tmp_path: Path) -> None:
    machine = Machine(tmp_path).put("class/thermal/thermal_zone0/temp", "45000")
    heat = "class/thermal/thermal_zone1/temp"
    assert machine.put(heat, "80000").resting() == ""
    assert machine.put(heat, "80500").resting() == "80 °C; more than 80 °C ([throttle] max_temperature), until 75 °C"
    assert (
        machine.put(heat, "76000").resting() == "76 °C; was more than 80 °C ([throttle] max_temperature), until 75 °C"
    )
    assert machine.put(heat, "75000").resting() == ""
    assert machine.put(heat, "79000").resting() == ""


def test_a_battery_counts_while_it_is_being_emptied(tmp_path: Path) -> None:
    machine = Machine(tmp_path).put("class/power_supply/AC/type", "Mains")
    assert machine.battery("19", "Charging").resting() == ""
    assert "battery at 19 %; less than 20 %" in machine.battery("19", "Discharging").resting()
    assert (
        "battery at 24 %; was less than 20 % ([throttle] min_battery), until 25 %"
        in machine.battery("24", "Discharging").resting()
    )
    assert machine.battery("24", "Charging").resting() == ""


def test_tasks_slow_down_before_they_pause(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heat, machine = "class/thermal/thermal_zone0/temp", Machine(tmp_path)
    states = []
    for reading in ("75000", "76000", "71000", "81000", "76000", "74000", "70000"):
        machine.put(heat, reading).resting()
        status = machine.status
        states.append("pause" if status.pause_reason else "slow" if status.slow_reason else "run")
    assert states == ["run", "slow", "slow", "pause", "pause", "slow", "run"]
    changes = [text.partition(":")[0].partition(";")[0] for text in caplog.messages]
    assert changes == [
        f"tasks {text}" for text in ("slow down", "pause", "no longer pause", "slow down", "no longer slow down")
    ]
    machine.put(heat, "40000").battery("29", "Discharging")
    assert machine.shown()["slowed"] == "battery at 29 %; less than 30 % ([throttle] slow_battery), until 35 %"


def test_slowed_tasks_rest_for_their_share_of_the_time(tmp_path: Path) -> None:
    care = Throttle(config.ThrottleConfig(duty_cycle=0.2), tmp_path)
    assert care.rest_s(2.0) == 0.0
    Machine(tmp_path).put("class/thermal/thermal_zone0/temp", "78000")
    care.tick(at(1000.0))
    assert care.rest_s(2.0) == pytest.approx(8.0)


def test_only_current_throttling_of_a_raspberry_pi_counts(tmp_path: Path) -> None:
    bits = "devices/platform/soc/soc:firmware/get_throttled"
    machine = Machine(tmp_path)
    assert machine.put(bits, "50000").resting() == ""
    assert machine.put(bits, "50005").resting() == (
        "the firmware throttles the processor: its supply voltage is too low, it is throttled"
    )
    assert Machine(tmp_path, throttled="ignore").resting() == ""


@pytest.mark.parametrize("text", ["", "hot", "-1000", "0", "9" * 400, "nan"])
def test_a_sensor_that_says_nothing_of_use_is_no_reason_to_rest_for_ever(tmp_path: Path, text: str) -> None:
    machine = Machine(tmp_path).put("class/thermal/thermal_zone0/temp", text)
    machine.battery(text if text != "0" else "-1", "Discharging")
    machine.put("devices/platform/soc/soc:firmware/get_throttled", text if text != "9" * 400 else "x")
    assert machine.resting() == ""
    assert machine.shown() == {}


def test_what_is_known_is_shown(tmp_path: Path) -> None:
    machine = Machine(tmp_path).put("class/thermal/thermal_zone0/temp", "51234").battery("64", "Discharging")
    assert machine.shown() == {"temperature": 51.234, "battery": 64.0}


def test_it_looks_at_sensors_every_ten_seconds_only(tmp_path: Path) -> None:
    looking = Throttle(config.ThrottleConfig(), tmp_path)
    looking.tick(at(1000.0))
    Machine(tmp_path).put("class/thermal/thermal_zone0/temp", "99000")
    assert looking.tick(at(1009.0)).pause_reason == ""
    assert looking.tick(at(1010.0)).pause_reason != ""


def test_only_the_thread_that_runs_models_steps_back() -> None:
    own: list[int] = []

    def step() -> None:
        throttle.lower_priority(config.ThrottleConfig(nice=7))
        own.append(os.getpriority(os.PRIO_PROCESS, 0))

    before = os.getpriority(os.PRIO_PROCESS, 0)
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert own == [max(7, before)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_a_low_priority_is_not_set_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setpriority", forbidden)
    monkeypatch.setattr(os, "getpriority", lambda *_: 5)
    monkeypatch.setattr(psutil.Process, "ionice", lambda self, *given: forbidden() if given else (2, 7))
    throttle.lower_priority(config.ThrottleConfig(nice=5))
    assert caplog.messages == []
    throttle.lower_priority(config.ThrottleConfig(nice=6))
    assert [message.startswith("[throttle] nice: ") for message in caplog.messages] == [True]
