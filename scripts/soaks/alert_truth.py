"""Alert truth: four devices with recorded exercises, a roll-out in the middle, and each alert beside what is true.

One device is fine, one has a stuck field, one a field that loses gain, and one a field that is wrong from its first
row. The recordings of three people come in random order, so that people, exercises and pauses change all the time. In
the middle, another bundle with a reference of other data takes over. It must neither clear what is open nor learn from
it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from outstation.device.bootstrap import tasks
from outstation.device.bootstrap.device import load_config, open_message_log, open_store
from outstation.device.pipeline import batch
from outstation.device.store.rows import Rows
from outstation.device.store.store import Store
from outstation.foundation.arrays import Float32s
from outstation.foundation.clock import ClockReading
from outstation.ml.datasets import recordings
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.inference import runtime
from outstation.protocol.wire import keys
from outstation.protocol.wire.keys import SigningKey
from outstation.workbench.authoring import pack
from outstation.workbench.testing.process import run_outstation
from scripts.soaks import Result

FIELDS = ("ax", "ay", "az", "wx", "wy", "wz")
_RATE = 50  # rows per second
_CHUNK = 6_000
_BEGIN_US = 1_795_000_000_000_000
# Share of the run at which faults begin: after the reference is learned.
_FAULT_AT, _ROLLOUT_AT = 0.4, 0.6


class Scenario(msgspec.Struct, frozen=True):
    """Readings of one device: `change` is applied to rows (n, 6) from `begins` on, a share of the run.

    `expected` and `allowed` are alerts, as `<alert> <subject>`: those that must be raised, and those that follow.
    """

    change: Callable[[Float32s], None]
    begins: float
    expected: frozenset[str]
    allowed: frozenset[str] = frozenset()


def _leave(rows: Float32s) -> None:
    pass


def _stick(rows: Float32s) -> None:
    rows[:, 4] = 0.25


def _weaken(rows: Float32s) -> None:
    rows[:, 0] *= 0.5


def _offset(rows: Float32s) -> None:
    rows[:, 1] += 1.0


_ANSWERS = frozenset({"drift output", "drift score", "drift joint"})
SCENARIOS = {
    "fine": Scenario(_leave, 0.0, frozenset()),
    "stuck": Scenario(_stick, _FAULT_AT, frozenset({"fault wy"}), _ANSWERS),
    "weak": Scenario(_weaken, _FAULT_AT, frozenset({"drift ax"}), _ANSWERS),
    "wrong": Scenario(_offset, 0.0, frozenset({"drift reference"})),
}


def alert_truth(folder: Path, seed: int, hours: float, report: Callable[[str], None]) -> Result:
    """Run each device through `hours` of readings; a false alert or a missing one is a problem."""
    result, rows = Result(), int(hours * 3600 * _RATE)
    key = keys.generate(folder / "publisher.key")
    successor = _pack_successor(folder / "successor", key)
    for number, (name, scenario) in enumerate(SCENARIOS.items()):
        config = _write_config(folder / name, key)
        alerts, still_open = _run_device(config, successor, scenario, rows, seed + number)
        raised = {f"{alert['alert']} {alert['subject']}" for alert in alerts if alert["state"] == "raised"}
        for alert in alerts:
            kind = f"{alert['alert']} {alert['subject']}"
            verdict = "true" if kind in scenario.expected else "follows" if kind in scenario.allowed else "FALSE"
            report(f"{name:6} row {alert['row']:>7} {alert['state']:8} {verdict:8} {kind}: {alert['summary']}")
        result.problems += [
            f"{name}: false: {kind}" for kind in sorted(raised - scenario.expected - scenario.allowed)
        ] + [f"{name}: missing: {kind}" for kind in sorted(scenario.expected - raised)]
        result.problems += [f"{name}: cleared: {kind}" for kind in sorted(scenario.expected - still_open)]
        result.figures[name] = {"raised": sorted(raised), "open": sorted(still_open)}
    return result


def _write_config(folder: Path, key: SigningKey) -> Path:
    done = run_outstation("init", str(folder))
    assert done.returncode == 0, done.stderr
    config = folder / "outstation.toml"
    fields = ", ".join(f'{{ name = "{name}" }}' for name in FIELDS)
    head = config.read_text(encoding="utf-8").split("[streams.")[0]
    config.write_text(
        f'{head}\n[publishers]\nkeys = ["{key.public.text}"]\n[models]\nconfinement = "off"\n'
        f"[streams.watch]\nfields = [{fields}]\n"
        '[tasks.exercise]\nstream = "watch"\nbundle = "exercise"\n',
        encoding="utf-8",
    )
    return config


def _pack_successor(folder: Path, key: SigningKey) -> Path:
    """Write the shipped bundle as version 2, with a reference of other recordings, signed by `key`."""
    shipped = builtin.resolve_path(Path("exercise"))
    shutil.copytree(shipped, folder)
    loaded = bundle.read(shipped, None)
    model = runtime.load_model(loaded.manifest, loaded.model_bytes)
    reference = pack.build_reference(_recordings_path(), model, loaded.manifest, {}).to_json()
    (folder / "reference.json").write_bytes(reference)
    document = json.loads((folder / "manifest.json").read_bytes())
    document["version"] = "2.0.0"
    document["files"]["reference.json"] = f"sha256:{hashlib.sha256(reference).hexdigest()}"
    head = json.dumps(document, indent=2).encode()
    (folder / "manifest.json").write_bytes(head)
    (folder / "manifest.jws").write_bytes(bundle.MANIFEST_DOMAIN.sign_file(key, head))
    return folder


def _run_device(
    config: Path, successor: Path, scenario: Scenario, rows: int, seed: int
) -> tuple[list[dict[str, Any]], set[str]]:
    """Return all alerts, each with the last row of its window, and those that are open at the end."""
    readings = _shuffle_recordings(rows, seed)
    scenario.change(readings[int(scenario.begins * rows) :])
    file, conf = load_config(str(config))
    with open_store(conf) as store:
        middle = int(_ROLLOUT_AT * rows)
        _feed(store, file, config, readings, 0, middle)
        text = config.read_text(encoding="utf-8").replace('bundle = "exercise"', f'bundle = "{successor}"')
        config.write_text(text, encoding="utf-8")
        _feed(store, file, config, readings, middle, rows)
        bodies = [json.loads(message.payload) for message in store.unacknowledged_messages(0, 1_000_000)]
    alerts = [{**body, "row": body["evidence"].get("rows", [0, 0])[-1]} for body in bodies if body["kind"] == "alerts"]
    latest = {alert["id"]: alert for alert in alerts}
    still_open = {f"{a['alert']} {a['subject']}" for a in latest.values() if a["state"] == "raised"}
    return alerts, still_open


def _feed(store: Store, file: Path, config: Path, readings: Float32s, begin: int, end: int) -> None:
    """Append rows `begin` to `end` in chunks, and run the task after each."""
    _, conf = load_config(str(config))
    clock = ClockReading(_BEGIN_US, 1000.0, "synced")
    message_log, task = open_message_log(file, conf, store), tasks.load_task(file, conf, store, "exercise")
    for first in range(begin, end, _CHUNK):
        part = readings[first : min(first + _CHUNK, end)]
        t = _BEGIN_US + 1_000_000 // _RATE * np.arange(first, first + len(part), dtype=np.int64)
        with store.transaction() as tx:
            tx.append("watch", Rows(t, tuple(np.ascontiguousarray(column) for column in part.T)), "synced")
        while batch.run(task, store, message_log, clock) is not None:
            pass


def _shuffle_recordings(rows: int, seed: int) -> Float32s:
    """Return `rows` rows (n, 6) of the held-out recordings, in random order and as often as it takes."""
    table, rng = recordings.load(_recordings_path()), np.random.default_rng(seed)
    bounds = list(zip(table.starts[:-1].tolist(), table.starts[1:].tolist(), strict=True))
    parts: list[Float32s] = []
    total = 0
    while total < rows:
        for index in rng.permutation(len(bounds)).tolist():
            parts.append(np.asarray(table.rows[slice(*bounds[index])], np.float32))
            total += len(parts[-1])
    return np.concatenate(parts)[:rows].copy()


def _recordings_path() -> Path:
    return Path(builtin.recordings_dir()) / "exercise.npz"
