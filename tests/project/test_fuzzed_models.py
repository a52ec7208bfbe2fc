"""Damaged but validly signed models: the agent keeps its current model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from outstation.ml.model.inference import tuning
from scripts.fuzzing.mutate import mutated
from scripts.kit.bundles import change_manifest, model
from tests.kit.bundle_devices import Device, versions

BYTES, GRAPHS, CUTS = 7, 10, 3


def damaged(count: int) -> list[bytes]:
    sound, random = model("classify_int8"), Random("bytes 1")
    return [mutated([sound], random, 1 << 20) for _ in range(count)]


def cut(count: int) -> list[bytes]:
    sound = model("classify_int8")
    return [sound[: len(sound) * part // count] for part in range(count)]


def with_wrong_graphs(count: int) -> list[bytes]:
    if not all(importlib.util.find_spec(name) for name in ("ai_edge_litert", "flatbuffers")):
        return []
    from scripts.fuzzing import graphs

    random = Random("graphs 1")
    return [graphs.mutated(model("classify_int8"), random) for _ in range(count)]


FUZZED = [*damaged(BYTES), *cut(CUTS), *with_wrong_graphs(GRAPHS)]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    made = Device(tmp_path_factory.mktemp("device"), versions(tmp_path_factory.mktemp("bundles"), "1", "2"))
    yield made
    made.store.close()


def configure(device: Device, content: bytes) -> None:
    """Configure the bundle with that model: signed, all hashes correct, golden vectors of the undamaged model."""
    device.configure("2")
    folder = device.home / "data" / "bundles" / "tiny"
    (folder / "model.tflite").write_bytes(content)

    def change(head: dict[str, Any]) -> None:
        head["files"]["model.tflite"] = tuning.model_digest(content)
        head["limits"] = {"seconds": 3, "memory_mib": 512}

    change_manifest(folder, change)


def test_fuzzed_models_neither_stop_the_agent_nor_replace_a_good_model(device: Device) -> None:
    refused = 0
    for number, content in enumerate(FUZZED):
        device.store.close()
        configure(device, content)
        device.start()
        if device.runs() == "1":
            [broken] = device.daemon._bundle_failures
            assert (broken.fallback, bool(broken.reason)) == ("tiny 1", True), number
            refused += 1
        else:
            # Damage that golden vectors cannot detect: the model behaves as the undamaged one.
            assert device.runs() == device.results_by() == "2", number
            device.crash("1")
        assert device.results_by() == "1", number
    assert refused > len(FUZZED) / 2
