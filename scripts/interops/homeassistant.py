"""Home Assistant itself, on loopback, with a broker, a collector and a device of ours; entities are read over REST."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from outstation.integrations.homeassistant.discovery import Place
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage
from outstation.workbench.testing.broker import free_port
from outstation.workbench.testing.fleet import FLEET, LocalFleet
from outstation.workbench.testing.process import MissingProgram, run_outstation
from scripts.kit.steps import CACHE, Steps

VERSION = "2026.2.3"
# The frontend, without which Home Assistant starts in recovery mode, and libraries that it would install at its start.
PACKAGES = (
    f"homeassistant=={VERSION}",
    *("home-assistant-frontend==20260128.6", "numpy==2.3.2", "zlib-ng", "isal", "paho-mqtt==2.1.0"),
)
DEVICE = "pi.01"
# Raised and cleared again and again while the recording is replayed.
RULES = "".join(
    f'\n[[tasks.exercise.alerts]]\nname = "{name.lower()}"\nlabel = "{name}"\n' for name in ("PEN", "ABD", "FEL")
)
USER = {"name": "interop", "username": "interop", "password": "interop-interop", "language": "en"}
CONFIGURATION = """\
homeassistant:
  name: interop
  unit_system: metric
  time_zone: UTC
http:
  server_host: 127.0.0.1
  server_port: {port}
api:
websocket_api:
logger:
  default: warning
"""
# Runs in Home Assistant's own Python: checks a discovery document against its schemas.
VALIDATE = """
import asyncio, importlib, json, sys, tempfile
from homeassistant.components.mqtt.discovery import MQTTDiscoveryPayload, _replace_all_abbreviations
from homeassistant.components.mqtt.schemas import DEVICE_DISCOVERY_SCHEMA
from homeassistant.core import HomeAssistant
async def main():
    hass = HomeAssistant(tempfile.mkdtemp())
    document = MQTTDiscoveryPayload(json.load(sys.stdin))
    _replace_all_abbreviations(document)
    DEVICE_DISCOVERY_SCHEMA(document)
    for component in document["components"].values():
        module = importlib.import_module("homeassistant.components.mqtt." + component.pop("platform"))
        module.DISCOVERY_SCHEMA({**component, "device": document["device"], "origin": document["origin"]})
    print(len(document["components"]))
asyncio.run(main())
"""


class Server:
    """A running Home Assistant and its REST interface."""

    def __init__(self, home: Path, port: int) -> None:
        self.log, self._url, self._token = home / "log", f"http://127.0.0.1:{port}", ""

    def request(self, path: str, data: dict[str, str] | None = None, *, form: bool = False) -> Any:
        """Send a request; return the JSON of the answer, None without one."""
        headers, body = {}, None
        if data is not None:
            body = (urllib.parse.urlencode(data) if form else json.dumps(data)).encode()
            headers["Content-Type"] = "application/x-www-form-urlencoded" if form else "application/json"
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            with urllib.request.urlopen(urllib.request.Request(self._url + path, body, headers), timeout=10) as answer:
                return json.load(answer)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None

    def sign_up(self) -> bool:
        """Create the first user, once Home Assistant answers."""
        client = f"{self._url}/"
        answer = self.request("/api/onboarding/users", {**USER, "client_id": client})
        if answer is None:
            return False
        form = {"client_id": client, "grant_type": "authorization_code", "code": answer["auth_code"]}
        self._token = self.request("/auth/token", form, form=True)["access_token"]
        return True

    def states(self) -> dict[str, Any]:
        """Return entity id → state and attributes, of the device only."""
        states = self.request("/api/states") or []
        return {state["entity_id"]: state for state in states if "pi_01" in state["entity_id"]}

    def state(self, entity: str) -> str:
        return str(self.states().get(entity, {}).get("state", ""))

    def has_changed(self, entity: str, before: str) -> bool:
        return self.state(entity) != before

    def attribute(self, entity: str, name: str) -> str:
        return str(self.states().get(entity, {}).get("attributes", {}).get(name, ""))


def install(steps: Steps) -> Path:
    """Return the Python of an environment with Home Assistant, made at the first run."""
    folder = CACHE / "homeassistant" / "venv"
    python = folder / "bin" / "python"
    versions = (
        subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True) if python.exists() else None
    )
    if versions is None or f"homeassistant=={VERSION}" not in versions.stdout:
        base = shutil.which("python3.13")
        if base is None:
            raise MissingProgram("python3.13, on which Home Assistant 2026.2 runs")
        steps.report(f"installing Home Assistant {VERSION} in {folder}: 1 GB")
        subprocess.run([base, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


@contextlib.contextmanager
def running(python: Path, home: Path, broker_port: int) -> Iterator[Server]:
    """Run Home Assistant with its MQTT integration set up for a broker on this machine."""
    port = free_port()
    (home / ".storage").mkdir(parents=True)
    (home / "configuration.yaml").write_text(CONFIGURATION.format(port=port), encoding="utf-8")
    time = "2026-01-01T00:00:00+00:00"
    entry = {
        "data": {"broker": "127.0.0.1", "port": broker_port, "protocol": "5"},
        "domain": "mqtt", "entry_id": "01INTEROP00000000000000MQTT", "title": "broker", "source": "user",
        "version": 1, "minor_version": 2, "created_at": time, "modified_at": time, "disabled_by": None,
        "discovery_keys": {}, "options": {}, "pref_disable_new_entities": False, "pref_disable_polling": False,
        "subentries": [], "unique_id": None,
    }  # fmt: skip
    document = {"version": 1, "minor_version": 5, "key": "core.config_entries", "data": {"entries": [entry]}}
    (home / ".storage" / "core.config_entries").write_text(json.dumps(document), encoding="utf-8")
    server = Server(home, port)
    with server.log.open("wb") as log:
        process = subprocess.Popen([python.parent / "hass", "-c", home, "--skip-pip"], stdout=log, stderr=log)
    try:
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def read_discovery(broker: str) -> bytes:
    """Return the device's retained discovery document."""
    topic = Place(FLEET, "collector", "homeassistant").config_topic(DEVICE)
    with Link(BrokerConfig(url=broker), "interop", subscribe=[topic]) as link:
        for _ in range(50):
            for event in link.receive(0.2):
                if isinstance(event, IncomingMessage) and b"drift-exercise" in event.payload:
                    return event.payload
    return b""


def run(folder: Path) -> None:
    """Run everything in `folder`. Raises AssertionError at the first check that fails."""
    steps = Steps()
    python = install(steps)
    with contextlib.ExitStack() as stack:
        fleet = stack.enter_context(LocalFleet(folder))
        fleet.broker.start()
        with (fleet.home / "fleet.toml").open("a", encoding="utf-8") as file:
            file.write("\n[homeassistant]\n")
        device = fleet.add_device(DEVICE).add_replay_stream(100_000, 10).add_task("exercise", extra_toml=RULES)
        fleet.collector.start()
        device.start_and_wait()
        document = steps.wait("discovery document", lambda: read_discovery(fleet.broker.url), 120)
        checked = subprocess.run([python, "-c", VALIDATE], input=document, capture_output=True, check=False)
        if checked.returncode:
            raise AssertionError(f"Home Assistant's schemas refuse it: {checked.stderr.decode()[-2000:]}")
        steps.report(f"Home Assistant's schemas accept all {checked.stdout.decode().strip()} entities")

        server = stack.enter_context(running(python, folder / "homeassistant", fleet.broker.port))
        steps.wait("Home Assistant runs", server.sign_up, 300)
        label = "sensor.pi_01_exercise"
        steps.wait("newest result", lambda: server.state(label) not in ("unavailable", "unknown", ""), 120)
        steps.report(f"attributes of {label}: {', '.join(sorted(server.states()[label]['attributes']))}")
        steps.wait("resent at its start", lambda: fleet.collector.log_contains("homeassistant: it has started"))
        steps.wait("drift", lambda: server.state("sensor.pi_01_exercise_drift"))
        steps.wait("health", lambda: server.state("sensor.pi_01_storage_used"))
        steps.wait("alerts", lambda: server.state("sensor.pi_01_open_alerts"))
        alert = "event.pi_01_alert"
        steps.wait("an alert fires", lambda: server.attribute(alert, "event_type") in ("raised", "cleared"), 200)
        for _ in range(2):
            fired = server.state(alert)
            kind, summary = (server.attribute(alert, name) for name in ("event_type", "summary"))
            steps.report(f"{alert} at {fired}: {kind}, {summary}")
            steps.wait("the next one", partial(server.has_changed, alert, fired), 200)
        for entity, state in sorted(server.states().items()):
            steps.report(f"  {entity} = {state['state']} {state['attributes'].get('unit_of_measurement', '')}")
        device.stop()
        steps.wait("stopped, so unavailable", lambda: server.state(label) == "unavailable")
        device.start_and_wait()
        steps.wait("available again", lambda: server.state(label) not in ("unavailable", ""))
        fleet.collector.stop()
        steps.wait("no collector, so unavailable", lambda: server.state(label) == "unavailable")
        fleet.collector.start()
        steps.wait("available again", lambda: server.state(label) not in ("unavailable", ""))
        revoked = run_outstation("fleet", "revoke", DEVICE, "--dir", str(fleet.home))
        steps.report(f"fleet devices revoke: exit {revoked.returncode}")
        steps.wait("revoked, so removed", lambda: not server.states())
        errors = [
            line for line in server.log.read_text(errors="replace").splitlines() if "mqtt" in line and "ERROR" in line
        ]
        if errors:
            raise AssertionError(f"Home Assistant logged errors: {errors[:5]}")
        steps.report("ok: no error of the MQTT integration in the log")
