"""Prometheus scrapes a real collector, and evaluates deploy/prometheus-rules.yml on what it read."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outstation.workbench.testing.broker import free_port
from outstation.workbench.testing.fleet import LocalFleet
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import find_program

RULES = Path(__file__).parents[2] / "deploy" / "prometheus-rules.yml"


class PrometheusServer:
    """A Prometheus on loopback that scrapes `targets`, with its data in `folder`."""

    def __init__(self, folder: Path, targets: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._port = folder, free_port()
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [{"job_name": "outstation", "static_configs": [{"targets": targets}]}],
        }
        # JSON is YAML.
        (folder / "prometheus.yml").write_text(json.dumps(config))

    @contextmanager
    def running(self) -> Iterator[PrometheusServer]:
        with (self._folder / "log").open("wb") as log:
            command = [find_program("prometheus"), f"--config.file={self._folder}/prometheus.yml"]
            command += [f"--storage.tsdb.path={self._folder}/data", f"--web.listen-address=127.0.0.1:{self._port}"]
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            wait_until("Prometheus answers", self._is_ready)
            yield self
        finally:
            process.terminate()
            process.wait(30)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query. Raises AssertionError with the server's words if it is refused."""
        return list(self._get(f"query?{urllib.parse.urlencode({'query': expression})}")["result"])

    def firing(self) -> set[str]:
        """Return the names of the alerts that are pending or firing."""
        return {alert["labels"]["alertname"] for alert in self._get("alerts")["alerts"]}

    def _get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/api/v1/{path}", timeout=20) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()}") from None

    def _is_ready(self) -> bool:
        try:
            return self.query("vector(1)") != []
        except (AssertionError, OSError):
            # It answers 503 until it has read its data.
            return False


def run(folder: Path) -> None:
    port = free_port()
    with LocalFleet(folder) as fleet:
        config = fleet.home / "fleet.toml"
        config.write_text(f'{config.read_text()}\n[metrics]\nlisten = "127.0.0.1:{port}"\n')
        device = fleet.add_device("pi-01").add_replay_stream(10**9, 40).add_task("exercise")
        fleet.broker.start()
        fleet.collector.start()
        device.start_and_wait()
        with PrometheusServer(folder / "prometheus", [f"127.0.0.1:{port}"]).running() as prometheus:
            up = 'outstation_device_up{device="pi-01"} == 1'
            wait_until("the device is up in Prometheus", lambda: prometheus.query(up))
            wait_until(
                "results are counted",
                lambda: prometheus.query('outstation_collector_messages_total{outcome="new"} > 5'),
            )
            series = prometheus.query('count({__name__=~"outstation_.*"})')[0]["value"][1]
            print(f"  {series} series scraped; up: {prometheus.query(up)[0]['metric']}")
            fleet.broker.kill()
            wait_until("the lost broker is an alert", lambda: "OutstationCollectorDisconnected" in prometheus.firing())
            print(f"  broker killed: {sorted(prometheus.firing())}")
            fleet.collector.stop()
            wait_until("the stopped collector is an alert", lambda: "OutstationCollectorDown" in prometheus.firing())
            print(f"  collector stopped: {sorted(prometheus.firing())}")
