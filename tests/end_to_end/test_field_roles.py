"""Roles of fields: a bundle's roles decide the causes that drift alerts name, from its folder to the messages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from outstation.device import config
from outstation.device.bootstrap import tasks
from outstation.device.config.config import Config
from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.pipeline import batch
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.recovery.open import open_store
from outstation.device.store.message_log import MessageLog
from outstation.device.store.rows import Rows
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.workbench.testing.messages import new_key
from scripts.kit.bundles import KEY, REGRESS, Floats, packed
from scripts.kit.stores import outbox_payloads

NOW = ClockReading(1_764_022_680_000_000, 100.0, "synced")
COMPUTED = replace(REGRESS, input=f"roles = {json.dumps(['computed'] * 4)}")


def judge(store: Store, task: LoadedTask, values: Floats, first: int) -> None:
    """Judge rows `values` (n, 4) that arrive behind row `first`."""
    t = NOW.wall_us + (first + np.arange(len(values), dtype=np.int64)) * 10_000
    with store.transaction() as tx:
        tx.append("machine", Rows(t, tuple(np.ascontiguousarray(column) for column in values.T)), "synced")
    author = MessageLog("acme", "pi-07", new_key(1), store.log_id, 1, 120_000)
    while batch.run(task, store, author, NOW) is not None:
        pass


def test_drift_after_a_restart_has_the_causes_of_the_bundles_roles(tmp_path: Path) -> None:
    bundle = packed(tmp_path, COMPUTED)
    conf = Config(
        device=config.DeviceConfig(id="pi-07", fleet="acme", data_dir=str(tmp_path)),
        publishers=config.PublishersConfig(keys=[KEY.public.text]),
        streams={"machine": StreamConfig(fields=[FieldConfig(name=name) for name in COMPUTED.fields])},
        tasks={"tiny": config.TaskConfig(stream="machine", bundle="tiny", learn_windows=20)},
    )
    values = COMPUTED.rows(1200)
    values[600:, 0] *= 3
    for part in (slice(0, 600), slice(600, 1200)):
        with open_store(tmp_path / "data") as store:
            store.declare_streams(conf.streams)
            task = tasks.load_task(tmp_path / "outstation.toml", conf, store, "tiny", bundle)
            judge(store, task, values[part], part.start)
            alerts = [body for body in outbox_payloads(store).values() if body.get("alert") == "drift"]
    assert [alert["subject"] for alert in alerts] == ["a"]
    assert "computed from" in alerts[0]["summary"]
