"""Small device folder and fleet folder with something in every file and table, for programs that damage them."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np

from outstation.device.bootstrap import device, tasks
from outstation.device.intake import label_intake
from outstation.device.pipeline import batch, labelled_output
from outstation.device.store.retention import AcknowledgedSeqs
from outstation.device.store.rows import Rows
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.foundation.cli.commands import cli
from outstation.foundation.clock import ClockReading
from outstation.ml.model.bundle import builtin
from outstation.ml.performance.labels import Label
from outstation.protocol.wire.messages import CommandPayload
from outstation.workbench.testing.messages import NEW_MODEL, MessageSender, new_key

NOW = ClockReading(1_764_022_680_000_000, 1000.0, "synced")
TIME = "2026-11-24T22:20:00.000000Z"
STREAM, TASK, ENROLLED = "watch", "exercise", "pi-07"
ROWS, CHUNK, CONSUMED = 3_000, 100, 2_000
ACKNOWLEDGED = 3
_DEVICE = """
[models]
confinement = "off"

[streams.watch]
fields = [
  { name = "ax" }, { name = "ay" }, { name = "az" }, { name = "wx" }, { name = "wy" }, { name = "wz" },
  { name = "mode", type = "category", optional = true },
]

[tasks.exercise]
stream = "watch"
bundle = "exercise"
learn_windows = 20
"""
_ALERT = {
    "alert": "drift",
    "subject": "ax",
    "state": "raised",
    "severity": "warning",
    "summary": "ax: rose.",
    "id": "exercise/ax/drift/1",
    "evidence": {},
}


def run(*words: str | Path) -> None:
    """Run a command that must succeed."""
    cli.main([str(word) for word in words], prog_name="outstation", standalone_mode=False)


def build_device(folder: Path) -> Path:
    """Make a device that has consumed part of its rows, with labels, alerts and acknowledged messages."""
    run("init", folder, "--id", ENROLLED)
    file = folder / "outstation.toml"
    template = file.read_text(encoding="utf-8").split("[streams.")[0]
    file.write_text(template + _DEVICE, encoding="utf-8")
    _, conf = device.load_config(str(file))
    rng = np.random.default_rng(7)
    with device.open_store(conf) as store:
        message_log = device.open_message_log(file, conf, store)
        task = tasks.load_task(file, conf, store, TASK)
        for first in range(0, ROWS, CHUNK):
            t = NOW.wall_us + 20_000 * np.arange(first, first + CHUNK, dtype=np.int64)
            columns = [rng.normal(0, 0.2, CHUNK).astype("<f4") for _ in range(6)]
            with store.transaction() as tx:
                texts = ["low", "high"] * (CHUNK // 2)
                codes, _ = tx.assign_category_codes(STREAM, "mode", texts, limit=100, last_row=first + CHUNK)
                segment = tx.segments.observe(NOW)
                rows = Rows(t, (*columns, np.array(codes, "<u2")))
                tx.append(STREAM, rows, "synced", segment=segment.number, boot_us=NOW.boot_us)
            while first < CONSUMED and (first + CHUNK) % 500 == 0 and batch.run(task, store, message_log, NOW):
                pass
        targets = labelled_output.build_label_targets([task])
        with store.transaction() as tx:
            for row in range(100, CONSUMED, 100):
                label_intake.store_label(tx, TASK, targets[TASK], Label(row, None, "PEN"), NOW)
            message_log.append(tx, "alerts", TASK, _ALERT, NOW)
            tx.outbox.set_acknowledged(AcknowledgedSeqs(ACKNOWLEDGED))
            tx.set_source_position("files", "a.csv", 17)
            tx.commands.replace_counter("operator", 5)
            head = {"v": 1, "kind": "cmd", "device": "pi-07", "id": "one", "name": "report", "counter": 6}
            command = msgspec.convert({**head, "issued": TIME, "expires": TIME}, CommandPayload)
            tx.commands.claim("operator", command, None)
    return folder


def build_fleet(folder: Path) -> Path:
    """Make a fleet with one device whose messages fill the tables, and a bundle repository."""
    run("fleet", "init", folder, "--broker", "mqtt://127.0.0.1:1", "--no-repository")
    run("fleet", "repository", "init", "--demo", "--url", "https://127.0.0.1:1/", "--dir", folder)
    store = FleetStore(folder / "fleet.db")
    sender = MessageSender(ENROLLED, new_key(3))
    store.enrol(ENROLLED, sender.key.public, replace=False, now=TIME)
    sent = [sender.results(), sender.drift(), sender.quiet_run(), sender.alert(), sender.shadow(), sender.quality()]
    sent += [sender.rollout("shadow", numbers={"n": 3}), sender.evicted((9, 9)), sender.health_with_cursor()]
    sent += [sender.results(model=NEW_MODEL), sender.results()]
    store.ingest([Arrival(sender.verify(item)) for item in sent if item.seq != 9], [], TIME)
    store.close()
    return folder


def build(folder: Path) -> Path:
    """Make `device/`, `fleet/`, and beside them a key, a bundle and files of rows and labels."""
    build_device(folder / "device")
    build_fleet(folder / "fleet")
    run("model", "keygen", folder / "publisher.key")
    shutil.copytree(builtin.bundles_dir() / "exercise", folder / "bundle")
    (folder / "rows.csv").write_text("ax,ay,az,wx,wy,wz\n" + "1,2,3,4,5,6\n" * 3, encoding="utf-8")
    (folder / "labels.csv").write_text("row,label\n100,PEN\n200,ABD\n", encoding="utf-8")
    return folder
