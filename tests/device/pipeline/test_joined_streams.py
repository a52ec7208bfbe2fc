"""Joined streams: batches in any pieces give the bits of the whole data, and windows wait for what may still come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from agent import config
from agent.authoring import pack
from agent.device.pipeline.joined_streams import JoinedStream, load_positions
from agent.device.store.rows import Rows
from agent.model.activation import LoadedBundle
from agent.model.bundle import bundle
from agent.model.inference import runtime
from agent.model.inference.inference import Inference
from agent.model.inference.joins import JoinedRows
from scripts.kit.bundles import KEY, WINDOW, WINDOWED, Recipe, waves, write_joined_spec
from tests.kit.devices import NOW, STEP_US, T0, Device, columns, tiles

WEATHER_STEP_US = 310_000
WAIT_S = 10.0


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    pack.write_bundle(pack.pack(write_joined_spec(tmp_path), KEY), tmp_path / "bundle")
    loaded = bundle.read(tmp_path / "bundle", [KEY.public])
    model = runtime.load_model(loaded.manifest, loaded.model_bytes)
    air = config.StreamConfig(fields=[config.FieldConfig(name=name) for name in ("other", "air")])
    streams = {"weather": JoinedStream("weather", air, WAIT_S)}
    recipe = Recipe("classify", "joined_int8", fields=WINDOWED)
    made = Device(tmp_path / "store", recipe, LoadedBundle(loaded, None, None, model), joined_streams=streams)
    yield made
    made.store.close()


def feed_weather(device: Device, values: NDArray[np.float32], first: int) -> None:
    t = T0 + (first + np.arange(len(values))) * WEATHER_STEP_US
    with device.store.transaction() as tx:
        tx.append("weather", Rows(t, (np.zeros(len(values), "<f4"), values)), "synced")


def test_batches_in_pieces_give_the_results_of_the_whole_data(device: Device) -> None:
    rows, air = waves(900, seed=3), waves(40, seed=4)[:, 0].copy()
    fed_rows = fed_air = 0
    random = np.random.default_rng(5)
    while fed_rows < len(rows) or fed_air < len(air):
        if random.random() < 0.6:
            count = int(random.integers(1, 120))
            if len(piece := rows[fed_rows : fed_rows + count]):
                device.feed(piece)
                fed_rows += len(piece)
        elif len(piece := air[fed_air : fed_air + int(random.integers(1, 6))]):
            feed_weather(device, piece, fed_air)
            fed_air += len(piece)
        device.run_all()
        if random.random() < 0.2:
            device.restart()
    manifest = device.active.bundle.manifest
    joined = JoinedRows(air[:, None], T0 + np.arange(len(air)) * WEATHER_STEP_US)
    whole = Inference(manifest, device.active.model).run(
        rows, T0 + np.arange(len(rows)) * STEP_US, joined={"weather": joined}
    )
    results = device.results()
    listed = columns(results)
    assert tiles(results) == (1, whole.cut.consumed)
    assert listed["row"] == (whole.cut.starts + WINDOW).tolist()
    assert listed["score"] == np.round(np.asarray(whole.scores.score), 4).tolist()
    # Columns of further outputs are no members of the wire's struct: they are read from the payload.
    payloads = [msgspec.json.decode(message.payload) for message in device.messages()]
    wear = [value for payload in payloads for value in payload["columns"]["value_wear"]]
    assert wear == [float(f"{v:.6g}") for v in whole.scores.extra_columns["value_wear"]]
    assert payloads[-1]["joined"]["weather"]["stream"] == "weather"
    # Rows that no later window needs may go.
    assert load_positions(device.store, "tiny")["weather"] == 24


def test_a_window_waits_for_a_later_row_of_the_joined_stream_but_not_for_ever(device: Device) -> None:
    feed_weather(device, np.ones(1, np.float32), 0)
    device.feed(waves(WINDOW * 2))
    assert device.run() is None
    assert device.run(msgspec.structs.replace(NOW, boot_s=NOW.boot_s + WAIT_S - 1)) is None
    late = device.run(msgspec.structs.replace(NOW, boot_s=NOW.boot_s + WAIT_S))
    assert late is not None
    assert late.windows == 3
    # The next windows wait anew, and a row of a later time ends that.
    device.feed(waves(WINDOW))
    assert device.run(msgspec.structs.replace(NOW, boot_s=NOW.boot_s + WAIT_S)) is None
    feed_weather(device, np.ones(1, np.float32), 1)
    ready = device.run()
    assert ready is not None
    assert ready.windows == 2
