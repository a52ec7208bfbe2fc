"""Command `outstation doctor`: fixes on request, an archive without secrets and readings, flash wear and power."""

from __future__ import annotations

import json
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from outstation.device import config
from outstation.device.cli.doctor import fixes, flash, power
from outstation.device.store.message_log import MessageLog
from outstation.foundation.clock import ClockReading
from outstation.protocol.alerts.kinds import FIELD_DRIFT
from outstation.protocol.client import Client
from outstation.protocol.wire import keys
from outstation.workbench.testing.messages import new_key
from tests.kit.commands import call_outstation
from tests.kit.stations import T0, Station

CONFIG = """\
[device]
id = "pi-07"
fleet = "acme"
data_dir = "data"

[broker]
url = "mqtt://127.0.0.1:1"
username = "sensor-user-kx1"
password = "broker-secret-kx2"

[collector]
delivery = "broker"

[notify.targets.chat]
kind = "webhook"
url = "https://hooks.example.org/token-kx3"

[streams.ward]
fields = [
  { name = "pulse", type = "f64", min = 0, max = 300 },
  { name = "patient", type = "category", optional = true },
]
source = { kind = "exec", command = ["python3", "read.py", "--password=kx4"] }
"""
VALUES = (71.3571113, 98.7532227)
PATIENTS = ("patient-kx5", "patient-kx6")
SECRETS = ("kx1", "kx2", "kx3", "kx4")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A configured device with a key that others can read, and rows."""
    (tmp_path / "outstation.toml").write_text(CONFIG)
    keys.generate(tmp_path / "device.key")
    return tmp_path


def doctor(home: Path, *options: str) -> tuple[int, dict[str, Any]]:
    done = call_outstation("doctor", "--json", *options, "-c", str(home / "outstation.toml"))
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_fixes_are_named_first_and_applied_only_on_request(home: Path) -> None:
    (home / "data").mkdir()
    (home / "data" / "intake.token").write_text("token")
    os.chmod(home / "data" / "intake.token", 0o640)
    (home / "data" / "labels.key").write_bytes(bytes(32))
    os.chmod(home / "data" / "labels.key", 0o640)
    os.rename(home / "device.key", home / "elsewhere.key")
    code, document = doctor(home)
    assert code == 1
    assert {fix["name"] for fix in document["fixes"]} == {"permissions", "key"}
    assert stat.S_IMODE((home / "data" / "intake.token").stat().st_mode) == 0o640
    assert not (home / "device.key").exists()
    _, document = doctor(home, "--fix", "--yes")
    assert {fix["name"] for fix in document["applied"]} == {"permissions", "key"}
    assert stat.S_IMODE((home / "data" / "intake.token").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "data" / "labels.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "device.key").stat().st_mode) == 0o600
    assert doctor(home)[1]["fixes"] == []


def test_a_config_that_waits_for_no_collector_is_changed_in_one_line(home: Path) -> None:
    file = home / "outstation.toml"
    file.write_text(CONFIG.replace('delivery = "broker"', 'delivery = "collector"  # as before'))
    doctor(home, "--fix", "--yes")
    assert file.read_text() == CONFIG.replace('delivery = "broker"', 'delivery = "broker"  # as before')
    file.write_text(CONFIG.replace('[collector]\ndelivery = "broker"\n', ""))
    doctor(home, "--fix", "--yes")
    assert config.load(file).collector.delivery == "broker"


def test_a_device_that_wears_out_its_card_is_offered_fewer_commits(home: Path) -> None:
    file = home / "outstation.toml"
    conf = config.load(file)
    [fix] = fixes.find_fixes(file, conf, 3 * 10**9)
    assert fix.name == "flash"
    fix.apply()
    assert config.load(file).buffer.commit_every == config.Duration(10.0)
    assert list(fixes.find_fixes(file, config.load(file), 3 * 10**9)) == []
    assert list(fixes.find_fixes(file, conf, None)) == []


def test_fixes_without_a_terminal_to_ask_on_are_not_applied(home: Path) -> None:
    os.chmod(home / "device.key", 0o644)
    done = call_outstation("doctor", "--fix", "-c", str(home / "outstation.toml"))
    assert done.returncode == 2
    assert "--yes" in done.stderr
    assert stat.S_IMODE((home / "device.key").stat().st_mode) == 0o644


def test_no_secret_and_no_reading_is_in_the_support_archive(home: Path) -> None:
    conf = config.load(home / "outstation.toml")
    (home / "data").mkdir()
    (home / "data" / "commitment.secret").write_bytes(b"kx7" * 11)
    with Station(conf) as station:
        with Client(station.socket, name="nurse") as client:
            for i, (value, patient) in enumerate(zip(VALUES, PATIENTS, strict=True)):
                client.send("ward", t=T0 + i, pulse=value, patient=patient)
            client.flush()
        log = MessageLog("acme", "pi-07", new_key(1), station.store.log_id, 1, 120_000)
        alert = FIELD_DRIFT.raised(f"pulse: mean {VALUES[0]}", field="pulse", count=1, now=VALUES[0])
        with station.store.transaction() as tx:
            log.append(tx, "alerts", None, alert.to_body(), ClockReading(int(T0 * 1e6), 1.0, "synced"))
    file = home / "support.tar.gz"
    _, document = doctor(home, "--archive", str(file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with tarfile.open(file) as archive:
        members = {member.name: archive.extractfile(member) for member in archive}
        text = "\n".join(content.read().decode() for content in members.values() if content is not None)
    assert set(document["archive"]["members"]) == {name.split("/")[1] for name in members}
    private = (home / "device.key").read_text().strip()
    sought = (*SECRETS, *PATIENTS, "kx7", private, *(str(value)[:6] for value in VALUES))
    assert [each for each in sought if each in text] == []
    # What a helper needs is there.
    assert '"rows": 2' in text
    assert '"subject": "pulse"' in text
    assert '"name": "patient"' in text


def test_years_left_follow_from_the_rating_and_what_is_written(tmp_path: Path) -> None:
    block = tmp_path / "devices" / "mmcblk0"
    (block / "mmcblk0p2").mkdir(parents=True)
    (block / "device").mkdir()
    (block / "device" / "life_time").write_text("0x02 0x01\n")
    (block / "size").write_text(f"{32 * 10**9 // 512}\n")
    (block / "mmcblk0p2" / "partition").write_text("2\n")
    (tmp_path / "dev" / "block").mkdir(parents=True)
    (tmp_path / "dev" / "block" / "179:2").symlink_to(block / "mmcblk0p2")
    medium = flash.find_medium(tmp_path, tmp_path, os.makedev(179, 2))
    assert medium == flash.Medium("mmcblk0", 32 * 10**9, "10 to 20 %, 0 to 10 %")
    rated = flash.describe_wear(500_000_000, medium, 20 * 10**12)
    assert (rated["years"], rated["assumed"]) == (54.8, False)
    assumed = flash.describe_wear(500_000_000, medium, None)
    assert (assumed["rating_bytes"], assumed["years"], assumed["assumed"]) == (32 * 10**11, 8.8, True)
    assert flash.describe_wear(None, medium, None)["years"] is None
    assert flash.find_medium(tmp_path, tmp_path, os.makedev(0, 42)) is None


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def test_power_is_measured_by_each_way_that_the_machine_has(tmp_path: Path) -> None:
    write(tmp_path / "class/hwmon/hwmon1", name="ina219", power1_input="5250000")
    write(tmp_path / "class/hwmon/hwmon2", name="ina3221", in1_input="5000", curr1_input="500")
    write(tmp_path / "class/hwmon/hwmon3", name="cpu_thermal", temp1_input="48000")
    write(tmp_path / "class/power_supply/BAT0", type="Battery", status="Discharging", power_now="6100000")
    write(tmp_path / "class/power_supply/BAT1", type="Battery", voltage_now="3700000", current_now="-1000000")
    write(tmp_path / "class/power_supply/AC", type="Mains", online="1")
    pmic = "3V3_SYS_A current(1)=0.50000000A\n3V3_SYS_V volt(9)=3.30000000V\n EXT5V_V volt(24)=5.15000000V\n"
    measured = power.measure(tmp_path, lambda: pmic)
    assert [round(each.watts, 3) for each in measured] == [1.65, 5.25, 2.5, 6.1, 3.7]
    assert power.measure(tmp_path / "none", lambda: "") == []
