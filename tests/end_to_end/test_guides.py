"""Guides: every stream, script, message and file of the guide to sensors, as a user would paste them."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from outstation.device import config
from outstation.device.store.store import Store
from outstation.fleet.rollout.plan import read as read_plan
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import OutgoingMessage
from outstation.workbench.testing.broker import MosquittoBroker
from outstation.workbench.testing.patience import wait_until
from scripts.kit.bundles import readings, write_csv
from tests.kit.commands import call_outstation
from tests.kit.stations import ROOT

GUIDES = ROOT / "docs" / "guides"
FIRST_PI = ROOT / "docs" / "start" / "first-pi.md"
SENSORS, PROGRAMS = GUIDES / "sensors.md", GUIDES / "sensor-programs.md"
BLOCK = re.compile(r"<!-- (\w+)(?:: ([^\n]+))? -->\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEAD = """\
[device]
id = "pi-07"
fleet = "home"
data_dir = "data"
[collector]
delivery = "broker"
[broker]
url = "{url}"
[buffer]
commit_every = "50 ms"
"""


def blocks(kind: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of the blocks of a kind."""
    for block_kind, name, text in BLOCK.findall(SENSORS.read_text(encoding="utf-8")):
        if block_kind == kind:
            yield name, text


def has_rows(home: Path, stream: str, count: int) -> bool:
    with Store.open_read_only(home / "data") as store:
        return store.last_row(stream) >= count


def test_every_stream_of_the_guide_gets_its_rows_as_the_guide_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with MosquittoBroker(tmp_path) as broker:
        port = broker.url.rpartition(":")[2]
        toml = HEAD.format(url=broker.url) + "".join(text for _, text in blocks("config"))
        # The guide's sources connect to the usual port.
        toml = toml.replace('kind = "mqtt",', f'kind = "mqtt", broker = {{ url = "{broker.url}" }},')
        (tmp_path / "outstation.toml").write_text(toml, encoding="utf-8")
        for name, text in blocks("file"):
            (tmp_path / name).write_text(text, encoding="utf-8")
        assert call_outstation("init", "key").returncode == 0
        shutil.move(tmp_path / "key" / "device.key", tmp_path / "device.key")
        log = (tmp_path / "daemon.log").open("wb")
        daemon = subprocess.Popen([sys.executable, "-m", "outstation", "run"], stdout=log, stderr=log)
        try:
            wait_until("the socket", (tmp_path / "data" / "intake.sock").exists)
            for stream in ("meter", "camera"):
                wait_until(f"the folder of {stream}", (tmp_path / stream / "done").exists)
            wait_until("the subscriptions", lambda: (tmp_path / "daemon.log").read_text().count("subscribed to") == 5)
            drop_files(tmp_path)
            for _, text in blocks("run"):
                done = subprocess.run(
                    [sys.executable, "-c", text], capture_output=True, text=True, timeout=30, check=False
                )
                # A slow sender's lines are answered in parts.
                accepted = [int(count) for count in re.findall(r"'accepted': (\d+)", done.stdout)]
                assert sum(accepted) == 3, done.stdout + done.stderr
            publish(broker.url)
            for _, text in blocks("shell"):
                run_command(text, port)
            conf = config.load(tmp_path / "outstation.toml")
            expected = {"door": 3, "meter": 4, "camera": 8}
            for stream in conf.streams:
                wait_until(f"rows of {stream}", partial(has_rows, tmp_path, stream, expected.get(stream, 1)))
        finally:
            daemon.terminate()
            assert daemon.wait(20) == 0
            log.close()


def drop_files(home: Path) -> None:
    for name, text in blocks("drop"):
        (home / "aside").write_text(text, encoding="utf-8")
        shutil.move(home / "aside", home / name)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(home / "shot.png")
    shutil.move(home / "shot.png", home / "camera" / "20261127T100000Z.png")


def publish(url: str) -> None:
    with Link(BrokerConfig(url=url), "gateway") as link:
        for topic, text in blocks("message"):
            link.send(OutgoingMessage(topic, text.strip().encode()))


def run_command(text: str, port: str) -> None:
    for line in text.splitlines():
        program, *arguments = shlex.split(line.removeprefix("$ "))
        if program == "outstation":
            done = call_outstation(*arguments)
            assert done.returncode == 0, done.stderr
        else:
            subprocess.run([program, "-p", port, *arguments], check=True, timeout=20)


def test_each_script_of_the_guides_is_valid_and_short() -> None:
    for guide in (SENSORS, PROGRAMS):
        for language, text in FENCE.findall(guide.read_text(encoding="utf-8")):
            if language == "python":
                ast.parse(text)
                assert len(text.splitlines()) <= 20
            elif language == "sh":
                assert subprocess.run(["sh", "-n"], input=text, text=True, check=False).returncode == 0


def test_the_streams_of_the_sensor_programs_are_valid(tmp_path: Path) -> None:
    toml = [text for language, text in FENCE.findall(PROGRAMS.read_text(encoding="utf-8")) if language == "toml"]
    assert len(toml) == 4
    (tmp_path / "outstation.toml").write_text(
        HEAD.format(url="mqtt://127.0.0.1:1883") + "".join(toml), encoding="utf-8"
    )
    assert set(config.load(tmp_path / "outstation.toml").streams) == {"air", "pipe", "meter", "scale"}


def test_the_unit_of_the_first_sensor_is_valid(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here")
    [unit] = [text for language, text in FENCE.findall(FIRST_PI.read_text(encoding="utf-8")) if language == "ini"]
    file = tmp_path / "sensor.service"
    file.write_text(unit.replace("/opt/outstation/bin/python", sys.executable), encoding="utf-8")
    done = subprocess.run([analyze, "verify", "--man=no", str(file)], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "sensor.service" in line] == []


def test_the_plan_for_a_small_fleet_is_valid(tmp_path: Path) -> None:
    page = (SENSORS.parents[1] / "start" / "own-model.md").read_text(encoding="utf-8")
    [text] = [text for language, text in FENCE.findall(page) if language == "toml" and "[rollout]" in text]
    (tmp_path / "plan.toml").write_text(text, encoding="utf-8")
    plan = read_plan(tmp_path / "plan.toml").to_plan("mymodel", "0.1.0", "sha256:" + "0" * 64)
    assert [step.strategy for step in plan.steps] == ["shadow", "all"]
    assert (plan.steps[0].promote.min_devices, plan.device_rules.min_hours) == (1, 0.1)


def test_the_script_for_1_wire_prints_a_row_of_what_the_kernel_reads(tmp_path: Path) -> None:
    [script] = [text for language, text in FENCE.findall(PROGRAMS.read_text(encoding="utf-8")) if language == "sh"]
    (tmp_path / "28-0316a2795b1f").mkdir()
    (tmp_path / "28-0316a2795b1f" / "temperature").write_text("21562\n")
    script = script.replace("/sys/bus/w1/devices", str(tmp_path))
    done = subprocess.run(["sh"], input=script, capture_output=True, text=True, check=True)
    assert done.stdout == '{"temperature": 21.562}\n'


def test_the_guide_to_features_makes_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    guide = (GUIDES / "features.md").read_text(encoding="utf-8")
    shutil.copy(ROOT / "tests" / "models" / "classify_float32.tflite", tmp_path / "pump.tflite")
    write_csv(tmp_path / "readings.csv", ("speed", "current"), readings(800)[:, :2])
    outputs = []
    for kind, name, text in BLOCK.findall(guide):
        if kind == "file":
            (tmp_path / name).write_text(text, encoding="utf-8")
        for line in text.splitlines() if kind == "run" else ():
            done = call_outstation(*shlex.split(line)[1:])
            assert done.returncode == 0, done.stderr
            outputs.append(done.stdout)
    pinned = json.loads((tmp_path / "pump" / "manifest.json").read_text())["input"]["features"]
    assert (pinned["name"], pinned["version"]) == ("motor", "1.0.0")
    assert pinned["digest"] in outputs[0]
    assert "speed_step" in outputs[0]
