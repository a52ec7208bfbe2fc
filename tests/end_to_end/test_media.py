"""Images and sounds put into a folder of a real daemon that is killed: the results of `model run`, each file once."""

from __future__ import annotations

import csv
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from outstation.device import config
from outstation.device.bootstrap import tasks
from outstation.device.cli.check import check
from outstation.device.cli.data.ingest import ingest
from outstation.device.store.store import Store
from outstation.foundation.errors import ConfigError, OutstationError, UsageError
from outstation.ml.datasets import training_data
from outstation.ml.model.bundle import bundle
from outstation.workbench.authoring import pack
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import OutstationProcess, run_outstation
from scripts.kit.bundles import KEY, MODELS
from tests.kit.commands import call_outstation
from tests.kit.devices import expand_columns
from tests.kit.stations import rows_of
from tests.ml.model.test_media import RATE, picture, write_wav

PERSON = """
name = "person"
version = "1"
kind = "classify"
model = "model.tflite"
labels = ["none", "person"]
[input]
image = { width = 32, height = 32 }
"""
# As in MLPerf Tiny, with fewer bands.
MACHINE = """
name = "machine"
version = "1"
kind = "anomaly"
model = "model.tflite"
[input]
sound = { rate = 16000, window = 1024, hop = 512, mels = 32 }
window = { rows = 5, step = 1 }
[output]
threshold = 300.0
"""
MADE = {
    "person": "image = { width = 32, height = 32 }",
    "machine": "sound = { rate = 16000, window = 1024, hop = 512, mels = 32 }",
}
FILES = {"person": 40, "machine": 12}


class Site:
    """A device of one stream of files and one task, without a broker, that can be killed."""

    def __init__(self, folder: Path, name: str, model: str, spec: str) -> None:
        self.folder, self.name = folder, name
        (folder / "model.tflite").write_bytes((MODELS / f"{model}.tflite").read_bytes())
        (folder / "spec.toml").write_text(spec)
        pack.write_bundle(pack.pack(folder / "spec.toml", KEY), folder / "bundle")
        assert call_outstation("init", str(folder), "--id", "pi-07").returncode == 0
        self.config, self.inbox = folder / "outstation.toml", folder / "in"
        text = self.config.read_text().replace('delivery = "collector"', 'delivery = "broker"')
        text = text.replace("mqtt://127.0.0.1:1883", "mqtt://127.0.0.1:9")
        text = text.replace('commit_every = "1 s"', 'commit_every = "50 ms"')
        self.config.write_text(f"""{text}
[publishers]
keys = ["{KEY.public.text}"]
[streams.files]
source = {{ kind = "files", folder = "in", poll_interval = "50 ms", {MADE[name]} }}
[tasks.{name}]
stream = "files"
bundle = "./bundle"
schedule = "every 200 ms"
""")
        self.inbox.mkdir()
        self.program = OutstationProcess(folder / "log", "run", "-c", str(self.config))

    def put(self, index: int, content: bytes) -> None:
        draft = self.folder / "draft"
        draft.write_bytes(content)
        os.utime(draft, (1_764_000_000 + 60 * index,) * 2)
        draft.rename(self.inbox / f"{index:02}.{'png' if self.name == 'person' else 'wav'}")

    def done(self) -> list[str]:
        return sorted(path.name for path in (self.inbox / "done").glob("*.[pw]*"))

    def results(self) -> list[dict[str, Any]]:
        with Store.open_read_only(self.folder / "data") as store:
            bodies = [json.loads(message.payload) for message in store.unacknowledged_messages(0, 100_000)]
        return [body for body in bodies if body["kind"] == "results"]

    def rows(self) -> NDArray[np.float32]:
        """All that are stored."""
        conf = config.load(self.config)
        with Store.open_read_only(conf.data_dir) as store:
            return np.stack(rows_of(store, "files", conf.streams["files"]).columns, axis=1)

    def used(self) -> int:
        try:
            return max((body["rows"][1] for body in self.results()), default=0)
        except OutstationError:
            return 0


@pytest.fixture(params=[("person", "foreign_image", PERSON), ("machine", "foreign_autoencoder", MACHINE)])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    if request.param[0] == "person":
        pytest.importorskip("PIL")
    made = Site(tmp_path, *request.param)
    yield made
    made.program.kill()


def content(site: Site, index: int) -> bytes:
    if site.name == "person":
        return picture((32, 32, 3), seed=index)
    samples = np.random.default_rng(index).normal(0, 0.05, 3 * RATE)
    return write_wav(site.folder / "x.wav", samples).read_bytes()


def test_results_of_files_equal_those_of_model_run_despite_a_kill(site: Site) -> None:
    count, rng = FILES[site.name], random.Random(1)
    for index in range(count):
        site.put(index, content(site, index))
    site.program.start()
    wait_until("a file that is taken", site.done)
    time.sleep(rng.uniform(0, 0.1))
    site.program.kill()
    site.program.start()
    wait_until("all files taken", lambda: len(site.done()) == count)
    rows = last_row(site)
    left = 0 if site.name == "person" else 4  # of the last sound, rows that no window begins with
    wait_until("all rows used", lambda: site.used() == rows - left)
    assert site.program.stop() == 0
    device = answers(site.results())
    out = site.folder / "out.csv"
    ran = run_outstation(
        "model", "run", str(site.folder / "bundle"), str(site.inbox / "done"), "-o", str(out), "--json"
    )
    assert json.loads(ran.stdout)["rejected"] == 0
    with out.open(newline="") as file:
        expected = list(csv.DictReader(file))
    column = "score" if site.name == "person" else "value"
    assert [row for row, _, _ in device] == [int(line["row"]) for line in expected]
    assert [label for _, label, _ in device] == [line["label"] for line in expected]
    # As messages tell them.
    digits = "{:.4f}" if column == "score" else "{:.6g}"
    assert [value for _, _, value in device] == [float(digits.format(float(line[column]))) for line in expected]
    spec = bundle.read(site.folder / "bundle", None).manifest.input
    assert site.rows().tobytes() == training_data.read(site.inbox / "done", spec).features.tobytes()
    spans = noted(site)
    assert all(spans[line["file"]][0] <= int(line["row"]) <= spans[line["file"]][1] for line in expected)


def last_row(site: Site) -> int:
    return max(last for _, last in noted(site).values())


def noted(site: Site) -> dict[str, tuple[int, int]]:
    with (site.inbox / "done" / "rows.csv").open(newline="") as file:
        return {line["file"]: (int(line["first"]), int(line["last"])) for line in csv.DictReader(file)}


def answers(results: list[dict[str, Any]]) -> list[tuple[int, str, float]]:
    """(row, label, score or value) of all messages, which together cover each row once."""
    rows: list[tuple[int, str, float]] = []
    for before, after in zip([{"rows": [0, 0]}, *results], results, strict=False):
        assert after["rows"][0] == before["rows"][1] + 1
    for body in results:
        columns = expand_columns(body["columns"])
        numbers = columns.get("score") or columns.get("value") or []
        rows += zip(columns["row"], columns.get("label") or [], numbers, strict=True)
    return rows


def test_a_stream_that_does_not_fit_a_media_bundle_gets_the_line_to_write(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    site = Site(tmp_path, "person", "foreign_image", PERSON)
    text = site.config.read_text()
    site.config.write_text(text.replace("height = 32 }", "height = 32, scale = 0.5 }"))
    with pytest.raises(ConfigError) as problem:
        tasks.load_task(site.config, config.load(site.config), None, "person")
    advice = 'configure a stream with source = { kind = "files", folder = "…", image = { width = 32, height = 32 } }'
    assert advice in str(problem.value)
    assert "tasks.person.stream" in str(problem.value)


def test_check_tells_what_a_folder_gives_and_ingest_where_its_files_belong(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    site = Site(tmp_path, "person", "foreign_image", PERSON)
    (tmp_path / "bundle" / "manifest.json").unlink()
    checked = CliRunner().invoke(check, ["-c", str(site.config), "--json"])
    [stream] = [entry for entry in json.loads(checked.stdout) if entry["name"] == "stream files"]
    assert stream["state"] == "ok"
    assert stream["detail"] == f"image = {{ width = 32, height = 32 }}, of the files in {site.inbox}"
    with pytest.raises(UsageError, match=f"takes images or sounds from its folder: copy them to {site.inbox}"):
        CliRunner().invoke(ingest, ["files", str(site.config), "-c", str(site.config)], catch_exceptions=False)
