"""A roll-out as a device has it: a real daemon and broker, bundles from a folder with the fleet's signed repository."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outstation.fleet import config as fleet_config
from outstation.ml.model.bundle import bundle
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import OutgoingMessage
from outstation.protocol.wire import jws, keys
from outstation.protocol.wire.jws import encode
from outstation.workbench.testing.fleet import FLEET, DeviceProcess, LocalFleet
from outstation.workbench.testing.patience import wait_until
from scripts.kit import rigged
from tests.kit.commands import audit_fleet, call_outstation
from tests.kit.marks import crashing

COUNTERS = itertools.count(1)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path_factory.mktemp("rolled-out")) as made:
        made.broker.start()
        made.collector.start()
        where = str(made.home / "repository")
        done = call_outstation("fleet", "repository", "init", "--demo", "--url", where, "--dir", str(made.home))
        assert done.returncode == 0, done.stderr
        made.config = fleet_config.load(made.home)
        yield made


@pytest.fixture(scope="module")
def offered(fleet: LocalFleet) -> dict[str, Path]:
    """Bundles that the operator signed and published, by what is wrong with them."""
    key = keys.load_private(Path(fleet.config.operator.key_file))
    made = {}
    for number, kind in enumerate(("good", "wrong", "crash"), start=2):
        made[kind] = rigged.write_bundle(rigged.build_rigged_bundle(kind, f"{number}.0.0", key), fleet.folder / kind)
        # One that would not prove itself is published all the same, as by somebody who did not look.
        done = call_outstation("fleet", "publish", str(made[kind]), "--no-probe", "--dir", str(fleet.home))
        assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def device(fleet: LocalFleet, offered: dict[str, Path]) -> DeviceProcess:
    made = fleet.add_device("pi-01")
    made.config.write_text(
        made.config.read_text(encoding="utf-8").replace('id = "pi-01"', 'id = "pi-01"\ngroups = ["roof"]'),
        encoding="utf-8",
    )
    return made.add_replay_stream(10**9, 20).add_task("exercise", schedule="every 300 ms").start_and_wait()


def desire(fleet: LocalFleet, folder: Path, strategy: str, rollout: str, topic: str, batches: int = 5) -> None:
    content = bundle.read(folder, None)
    named = {"rollout": rollout, "bundle": "exercise", "version": content.manifest.version, "digest": content.digest}
    rules = {"min_batches": batches, "min_hours": 0.0}
    leave(fleet, topic, {"exercise": {**named, "strategy": strategy, "rules": rules}})


def leave(fleet: LocalFleet, topic: str, tasks: dict[str, Any]) -> None:
    """Sign what is desired, and leave it on the broker, as the fleet's side does."""
    parts = topic.split("/")
    head = {"v": 1, "kind": "desired", "device": parts[0], **({"group": parts[2]} if len(parts) > 2 else {})}
    payload = encode({**head, "counter": next(COUNTERS), "issued": "2026-11-26T00:00:00Z", "tasks": tasks})
    key, full = keys.load_private(Path(fleet.config.operator.key_file)), f"outstation/{FLEET}/{topic}"
    with Link(BrokerConfig(url=fleet.broker.url), "operator") as link:
        link.send(OutgoingMessage(full, payload, (("jws", jws.sign(key, full, payload)),), retain=True))


def events(fleet: LocalFleet, rollout: str) -> list[tuple[str, str]]:
    """(phase, reason) of what the collector has of it."""
    rows = fleet.query("SELECT payload FROM messages WHERE device = 'pi-01' AND kind = 'audit' ORDER BY seq")
    bodies = [json.loads(row[0]) for row in rows]
    evidence = [body["evidence"] for body in bodies if body["event"] == "rollout"]
    return [(event["phase"], event["reason"]) for event in evidence if event["rollout"] == rollout]


def versions(fleet: LocalFleet) -> list[str]:
    """Those that made results, in order, each once in a row."""
    rows = fleet.query("SELECT payload FROM messages WHERE device = 'pi-01' AND kind = 'results' ORDER BY seq")
    return [name for name, _ in itertools.groupby(json.loads(row[0])["model"]["version"] for row in rows)]


def shadows(fleet: LocalFleet) -> list[dict[str, Any]]:
    rows = fleet.query("SELECT payload FROM messages WHERE device = 'pi-01' AND kind = 'shadow' ORDER BY seq")
    return [json.loads(row[0]) for row in rows]


def test_a_good_bundle_passes_every_phase_and_becomes_active(
    fleet: LocalFleet, device: DeviceProcess, offered: dict[str, Path]
) -> None:
    wait_until("results of the shipped one", lambda: versions(fleet))
    shipped = versions(fleet)[0]
    desire(fleet, offered["good"], "shadow", "better", "pi-01/desired")
    wait_until("it answers beside", lambda: shadows(fleet))
    assert events(fleet, "better") == [("downloading", ""), ("shadow", "")]
    assert versions(fleet) == [shipped]
    device.kill()
    device.start_and_wait()
    count = len(shadows(fleet))
    wait_until("it answers beside after a kill", lambda: len(shadows(fleet)) > count)
    desire(fleet, offered["good"], "all", "better", "pi-01/desired")
    wait_until("it settled", lambda: ("active", "") in events(fleet, "better"))
    assert events(fleet, "better") == [("downloading", ""), ("shadow", ""), ("canary", ""), ("active", "")]
    device.kill()
    device.start_and_wait()
    before = fleet.last_result_row("pi-01")
    wait_until("results after a kill", lambda: fleet.last_result_row("pi-01") > before)
    assert versions(fleet) == [shipped, "2.0.0"]
    task_status = device.status()["tasks"][0]
    assert (task_status["bundle"], task_status["rollout"]["phase"]) == ("exercise 2.0.0", "active")
    shown = call_outstation("status", "-c", str(device.config)).stdout
    assert "rollout better (all) of exercise 2.0.0: active since" in shown


def test_a_bundle_with_failing_golden_vectors_is_rejected_by_the_group(
    fleet: LocalFleet, device: DeviceProcess, offered: dict[str, Path]
) -> None:
    wait_until("the good one runs", lambda: "2.0.0" in versions(fleet))
    # Its own topic names the task no more: that of its group does.
    leave(fleet, "pi-01/desired", {})
    desire(fleet, offered["wrong"], "all", "bad", "_group/desired/roof")
    wait_until("it was refused", lambda: ("rejected", "golden_vectors") in events(fleet, "bad"))
    wait_until(
        "the alert is at the collector",
        lambda: fleet.query("SELECT 1 FROM alerts WHERE device = 'pi-01' AND id = 'exercise/rollout'"),
    )
    before = fleet.last_result_row("pi-01")
    wait_until("results go on", lambda: fleet.last_result_row("pi-01") > before)
    assert versions(fleet)[-1] == "2.0.0"


@crashing
def test_a_crashing_canary_is_rolled_back_and_the_daemon_survives(
    fleet: LocalFleet, device: DeviceProcess, offered: dict[str, Path]
) -> None:
    pid = device.pid
    # So many that it does not settle before it meets what it cannot bear.
    leave(fleet, "_group/desired/roof", {})
    desire(fleet, offered["crash"], "all", "deadly", "_all/desired", batches=10_000)
    wait_until("it was taken back", lambda: ("rolled_back", "crash") in events(fleet, "deadly"))
    assert device.is_running
    assert device.pid == pid
    before = fleet.last_result_row("pi-01")
    wait_until("results go on", lambda: fleet.last_result_row("pi-01") > before)
    assert versions(fleet)[-1] == "2.0.0"
    assert device.stop() == 0
    wait_until("all is at the collector", lambda: audit_fleet(fleet.home)[1]["passed"])
