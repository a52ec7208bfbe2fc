"""The example flow of docs/guides/node-red.md in Node-RED itself, with a broker and a device of ours."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from outstation.workbench.testing.broker import free_port
from outstation.workbench.testing.fleet import LocalFleet
from outstation.workbench.testing.process import find_program
from scripts.kit.npm import NODE_RED, install
from scripts.kit.steps import Steps

FLOW = Path(__file__).parents[2] / "docs" / "examples" / "node-red.json"
DEVICE = "pi.01"


def write_flow(file: Path, broker_port: int, output: Path) -> None:
    """Write the example with our broker, and a file in place of the debug pane."""
    nodes: list[dict[str, Any]] = json.loads(FLOW.read_text(encoding="utf-8"))
    for node in nodes:
        if node["type"] == "mqtt-broker":
            node["port"] = str(broker_port)
        elif node["type"] == "debug":
            options = {"filename": str(output), "filenameType": "str", "appendNewline": True, "overwriteFile": "false"}
            node |= {"type": "file", **options}
    file.write_text(json.dumps(nodes), encoding="utf-8")


def read_payloads(output: Path, kind: str) -> list[dict[str, Any]]:
    text = output.read_text(encoding="utf-8") if output.exists() else ""
    payloads = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [payload for payload in payloads if payload["kind"] == kind]


def run(folder: Path) -> None:
    """Run everything in `folder`. Raises AssertionError at the first check that fails."""
    steps = Steps()
    program = install(NODE_RED) / "node_modules" / "node-red" / "red.js"
    output, home = folder / "out.jsonl", folder / "node-red"
    home.mkdir()
    with LocalFleet(folder) as fleet:
        fleet.broker.start()
        write_flow(home / "flows.json", fleet.broker.port, output)
        settings = {
            "uiHost": "127.0.0.1",
            "uiPort": free_port(),
            "flowFile": "flows.json",
            "credentialSecret": False,
            "telemetry": {"enabled": False, "updateNotification": False},
        }
        (home / "settings.js").write_text(f"module.exports = {json.dumps(settings)};", encoding="utf-8")
        with (folder / "node-red.log").open("wb") as log:
            command = [
                find_program("node"),
                str(program),
                "--userDir",
                str(home),
                "--settings",
                str(home / "settings.js"),
            ]
            node_red = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            device = fleet.add_device(DEVICE).add_replay_stream(100_000, 100).add_task("exercise")
            fleet.collector.start()
            device.start_and_wait()
            steps.wait("a result", lambda: read_payloads(output, "result"), 120)
            steps.wait("ten results", lambda: len(read_payloads(output, "result")) >= 10, 120)
            steps.wait("online", lambda: any(state["online"] for state in read_payloads(output, "state")))
            device.stop()
            steps.wait("stopped", lambda: read_payloads(output, "state")[-1]["state"] == "stopped")
        finally:
            node_red.terminate()
            node_red.wait(30)
        results = read_payloads(output, "result")
        assert all(result["signed"] and result["label"] and result["device"] == DEVICE for result in results), results
        steps.report(f"{len(results)} results, the last {results[-1]}")
        steps.report(f"{len(read_payloads(output, 'alert'))} alerts, {read_payloads(output, 'state')} states")
