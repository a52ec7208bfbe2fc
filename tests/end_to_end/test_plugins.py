"""The package of the guide to plug-ins, installed by pip: a real daemon reads its source."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import OutstationProcess, run_outstation
from tests.kit.commands import call_outstation
from tests.kit.plugins import install_module, pip_install

# Real starts, as users and systemd do it.
pytestmark = pytest.mark.exec

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "plugin"
STREAMS = """
[streams.wave]
fields = [{{ name = "x" }}, {{ name = "y" }}]
source = {{ kind = "{}", interval = "20 ms" }}
"""


def make_device(home: Path, kind: str = "sine") -> Path:
    assert call_outstation("init", str(home), "--id", "pi-07").returncode == 0
    file = home / "outstation.toml"
    text = file.read_text().replace('delivery = "collector"', 'delivery = "broker"')
    file.write_text(text + STREAMS.format(kind))
    return file


def read_streams(file: Path, env: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the status of each stream; {} before the store is there."""
    done = run_outstation("status", "--json", "-c", str(file), env={**os.environ, **env})
    streams = json.loads(done.stdout)["streams"] if done.returncode == 0 else []
    return {stream["stream"]: stream for stream in streams}


def test_the_package_of_the_guide_has_forty_lines_and_a_daemon_reads_its_source(tmp_path: Path) -> None:
    assert len((EXAMPLE / "outstation_sine.py").read_text().splitlines()) <= 40
    pip_install(EXAMPLE, tmp_path / "packages")
    env = {"PYTHONPATH": str(tmp_path / "packages")}
    file = make_device(tmp_path / "device")
    check = run_outstation("check", "--config-only", "-c", str(file), env={**os.environ, **env})
    assert (check.returncode, "a sine wave of 60 s" in check.stdout) == (0, True), check.stdout
    daemon = OutstationProcess(tmp_path / "log", "run", "-c", str(file)).start(**env)
    try:
        wait_until("rows of the source", lambda: read_streams(file, env).get("wave", {"rows": 0})["rows"] > 20)
        assert daemon.stop() == 0
    finally:
        daemon.kill()
    readings = run_outstation("sine", "x", "y", "--rows", "600", env={**os.environ, **env})
    ingest = run_outstation("ingest", "wave", "-", "-c", str(file), input=readings.stdout, env={**os.environ, **env})
    assert "600" in ingest.stdout, ingest


def test_a_source_that_fails_runs_again_and_no_other_stream_stops(tmp_path: Path) -> None:
    text = (EXAMPLE / "outstation_sine.py").read_text().replace('"sine"', '"cosine"')
    text = text.replace("            await asyncio.sleep", "            return 1 / 0\n            await asyncio.sleep")
    install_module(tmp_path / "packages", "cosine", text, "outstation.sources", "cosine")
    env = {"PYTHONPATH": str(tmp_path / "packages")}
    file = make_device(tmp_path / "device", "cosine")
    daemon = OutstationProcess(tmp_path / "log", "run", "-c", str(file)).start(**env)
    try:
        wait_until("two restarts", lambda: daemon.log.read_text().count("its source failed") >= 2)
        problem = "wave: its source failed: ZeroDivisionError: division by zero; started again in"
        assert daemon.log_contains(problem)
        assert daemon.stop() == 0
    finally:
        daemon.kill()
    assert read_streams(file, env)["wave"]["source_restarts"] >= 2


def test_a_config_that_names_a_missing_package_says_so(tmp_path: Path) -> None:
    done = run_outstation("check", "-c", str(make_device(tmp_path / "device")))
    assert done.returncode == 2
    assert "streams.wave.source.kind: 'sine' is not a valid choice" in done.stderr
    assert "other packages can add some, see docs/guides/plugins.md" in done.stderr


FOLDER_SINK = """
import json, pathlib, time
from outstation.device.uplink.sink import Receipt

def check_url(url):
    if not url.startswith("folder:///"):
        raise ValueError("give folder:///PATH")

def check(config):
    return f"messages go to {config.broker.url}"

def open_sink(config, subscriptions, will):
    return Folder(pathlib.Path(config.broker.url.removeprefix("folder://")))

class Folder:
    window, max_bytes, traffic_bytes = 8, 1_000_000, 0

    def __init__(self, folder):
        self.folder, self.receipts, self.count = folder, [], 0

    def measure(self, message):
        return len(message.payload)

    def send(self, message):
        self.count += 1
        if self.count == 2 and not (self.folder / "failed").exists():
            (self.folder / "failed").touch()
            raise ZeroDivisionError("no such number")
        (self.folder / f"{time.time_ns()}.json").write_bytes(message.payload)
        self.receipts.append(Receipt(self.count, "accepted"))
        return self.count

    def receive(self, timeout_s):
        if not self.receipts:
            time.sleep(min(timeout_s, 0.05))
        receipts, self.receipts = self.receipts, []
        return receipts

    def acknowledge(self, delivery): pass
    def wake(self): pass
    def close(self): pass
    def drop(self): pass
"""


def test_a_sink_of_another_package_takes_the_messages_and_its_error_is_a_lost_link(tmp_path: Path) -> None:
    install_module(tmp_path / "packages", "folder_sink", FOLDER_SINK, "outstation.sinks", "folder")
    env = {"PYTHONPATH": str(tmp_path / "packages")}
    file = make_device(tmp_path / "device", "socket")
    text = file.read_text().replace(', interval = "20 ms"', "")
    received = tmp_path / "received"
    received.mkdir()
    file.write_text(text.replace('url = "mqtt://127.0.0.1:1883"', f'url = "folder://{received}"'))
    assert f'url = "folder://{received}"' in file.read_text()
    check = run_outstation("check", "-c", str(file), env={**os.environ, **env})
    assert (check.returncode, f"messages go to folder://{received}" in check.stdout) == (0, True), check.stdout
    daemon = OutstationProcess(tmp_path / "log", "run", "-c", str(file)).start(**env)
    try:
        wait_until("the sink opened again", lambda: daemon.log.read_text().count("connected to folder://") == 2)
        assert daemon.log_contains("the sink failed: ZeroDivisionError: no such number; trying again")
        assert daemon.stop() == 0
    finally:
        daemon.kill()
    messages = [json.loads(name.read_bytes()) for name in sorted(received.glob("*.json"))]
    assert {message["device"] for message in messages} == {"pi-07"}
    assert {"health", "state"} <= {message["kind"] for message in messages}
    file.write_text(file.read_text().replace("folder:///", "folder://here/"))
    wrong = run_outstation("check", "-c", str(file), env={**os.environ, **env})
    assert (wrong.returncode, "broker.url: folder://here/" in wrong.stderr) == (2, True), wrong.stderr
    assert "give folder:///PATH" in wrong.stderr


FILE_BRIDGE = """
import contextlib, pathlib
from outstation.fleet.bridge_config import BridgeSection

class Config(BridgeSection, frozen=True, tag="note"):
    note_file: str
    fault: bool = False

@contextlib.contextmanager
def build_publisher(config, section, location, is_leader):
    if section.fault:
        raise ZeroDivisionError("no such number")
    pathlib.Path(section.note_file).write_text(f"{config.fleet.name} {location}")
    yield
    raise ZeroDivisionError("too late")
"""


def test_the_collector_runs_a_bridge_of_another_package(tmp_path: Path) -> None:
    install_module(tmp_path / "packages", "note_bridge", FILE_BRIDGE, "outstation.bridges", "note")
    env = {"PYTHONPATH": str(tmp_path / "packages")}
    home = tmp_path / "acme"
    made = call_outstation("fleet", "init", str(home), "--no-repository", "--broker", "mqtt://127.0.0.1:9")
    assert made.returncode == 0, made.stderr
    config = home / "fleet.toml"
    config.write_text(config.read_text() + '\n[bridges.diary]\nkind = "note"\nnote_file = "note"\n')
    collector = OutstationProcess(tmp_path / "log", "fleet", "collect", "--dir", str(home)).start(**env)
    try:
        wait_until("the note of the bridge", lambda: (home / "note").exists() and (home / "note").read_text())
        assert (home / "note").read_text() == f"acme {home / 'fleet.db'}"
        assert collector.stop() == 0
    finally:
        collector.kill()
    assert collector.log_contains("fleet.toml: [bridges.diary] failed as it ended")
    config.write_text(config.read_text() + "fault = true\n")
    failed = run_outstation("fleet", "collect", "--dir", str(home), env={**os.environ, **env})
    assert failed.returncode == 2
    assert "fleet.toml: [bridges.diary] does not start: ZeroDivisionError: no such number; repair" in failed.stderr
    config.write_text(config.read_text().replace('kind = "note"', 'kind = "sparkplug"'))
    shipped = run_outstation("fleet", "collect", "--dir", str(home), env={**os.environ, **env})
    assert (shipped.returncode, "'sparkplug' is not a valid choice" in shipped.stderr) == (2, True), shipped.stderr
