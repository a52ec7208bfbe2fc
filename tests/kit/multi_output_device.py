"""A device with a model of three outputs (states, flags, wear), whose second input is a stream of air."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.device import config
from outstation.device.batch_parts.joined_streams import JoinedStream
from outstation.device.config.alert_rules import AlertRuleConfig
from outstation.device.store.rows import Rows
from outstation.ml.drift.baseline import window_statistics
from outstation.ml.model import activation
from outstation.ml.model.activation import LoadedBundle
from outstation.ml.model.bundle import bundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference import runtime
from outstation.workbench.authoring import error_training, pack
from scripts.kit.bundles import KEY, WINDOWED, Recipe, waves, write_csv, write_joined_spec
from tests.kit.devices import T0, Device

AIR_STEP_US = 310_000
Air = Callable[[int, int], NDArray[np.float32]]


def pack_bundle(folder: Path) -> Bundle:
    write_joined_spec(folder)
    write_csv(folder / "weather.csv", ("air",), still_air(60, 2)[:, None], step_s=0.31)
    pack.write_bundle(pack.pack(folder / "bundle.toml", KEY), folder / "bundle")
    return bundle.read(folder / "bundle", [KEY.public])


def with_held_out_errors(packed: Bundle) -> Bundle:
    """Return the bundle with held-out errors of wear, three times as large where the first field's mean is above 0."""
    reference, random = activation.read_reference(packed), np.random.default_rng(1)
    assert reference is not None
    rows, length = waves(4000, seed=9), reference.window_rows
    starts = np.arange(0, len(rows) - length, 4)
    statistics = window_statistics.compute_statistics(rows, starts, length, reference.floor).values
    answers = random.normal(size=len(starts))
    errors = random.normal(size=len(starts)) * np.where(statistics[:, 0] > 0, 3.0, 1.0)
    error = error_training.train(statistics, answers, errors)
    further = tuple(replace(r, error=error) if r.output.name == "wear" else r for r in reference.further)
    files = {**packed.files, "reference.json": replace(reference, further=further).to_json()}
    return replace(packed, files=files)


def make_device(folder: Path, packed: Bundle, rules: Sequence[AlertRuleConfig] = ()) -> Device:
    loaded_model = runtime.load_model(packed.manifest, packed.model_bytes)
    air = config.StreamConfig(fields=[config.FieldConfig(name=name) for name in ("other", "air")])
    loaded = LoadedBundle(packed, activation.read_reference(packed), None, loaded_model)
    recipe = Recipe("classify", "joined_int8", fields=WINDOWED)
    streams = {"weather": JoinedStream("weather", air, 10.0)}
    return Device(folder, recipe, loaded, joined_streams=streams, alerts=[*rules])


def still_air(count: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 0.5, count).astype("<f4")


def air_rows(air: NDArray[np.float32], after_us: int = 0) -> Rows:
    times = T0 + after_us + np.arange(len(air)) * AIR_STEP_US
    return Rows(times, (np.zeros(len(air), "<f4"), air))


def feed(device: Device, seed: int, count: int, make_air: Air = still_air) -> None:
    """Feed rows as usual, with this air."""
    n = -(-count * 10_000 // AIR_STEP_US)
    with device.store.transaction() as tx:
        tx.append("weather", air_rows(make_air(n, seed), device.fed), "synced")
    device.feed(waves(count, seed=seed))
    device.run_all()
