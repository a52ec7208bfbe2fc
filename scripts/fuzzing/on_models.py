"""Fuzz targets for damaged and malicious models; only the probe's child process may die.

A model that passes the probe then runs as in the daemon, in another process. A death of that process is a finding.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from random import Random

import msgspec
from msgspec.structs import replace

from outstation.ml.model.bundle import builtin, bundle, manifest
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.sandbox import probe
from outstation.ml.model.sandbox.probe import ProbeReport
from scripts.fuzzing import target
from scripts.kit.bundles import CLASSIFY, FLOAT, THIRD_PARTY, Recipe, around, model

_LONGEST = 1 << 20
_AS_THE_DAEMON = """\
import sys
import numpy as np
from outstation.foundation.errors import BadBundle
from outstation.ml.model.inference.runtime import TfliteModel
batch, threads = int(sys.argv[1]), int(sys.argv[2])
try:
    loaded = TfliteModel(sys.stdin.buffer.read(), batch, threads)
    low, high = loaded.input_range
    for count in (1, 3, batch, 500):
        loaded.invoke(np.random.default_rng(count).uniform(low, high, (count, *loaded.input_shape)).astype(np.float32))
except BadBundle:
    pass
"""


class ProcessDied(Exception):
    """Raised if a model that passed the probe ended the process that ran it."""


@functools.cache
def valid_bundles() -> list[Bundle]:
    """Return the shipped bundle with its golden vectors, and models without any, which are checked less."""
    bundles = [bundle.read(builtin.bundles_dir() / "exercise", None)]
    for recipe in (CLASSIFY, FLOAT):
        bundles.append(around(model(recipe.model), recipe))
    for name, recipe in (
        ("ad01", Recipe("anomaly", "", _inputs(640))),
        ("kws", Recipe("classify", "", _inputs(490), tuple(f"word {i}" for i in range(12)))),
    ):
        path = THIRD_PARTY / f"mlperf_{name}_int8.tflite"
        if path.exists():
            bundles.append(around(path.read_bytes(), recipe))
    return [_limit_resources(sound_bundle) for sound_bundle in bundles]


def _inputs(count: int) -> tuple[str, ...]:
    return tuple(f"x{i}" for i in range(count))


def _limit_resources(sound_bundle: Bundle) -> Bundle:
    """Limit time and memory, so that a hang or a memory leak ends soon."""
    content = msgspec.structs.replace(
        sound_bundle.manifest, limits=manifest.ResourceLimits(memory_mib=512, cpu_seconds=2)
    )
    return replace(
        sound_bundle, manifest=content, files={**sound_bundle.files, "manifest.json": manifest.encode(content)}
    )


def judge(sound_bundle: Bundle, content: bytes) -> ProbeReport:
    """Return the probe's verdict on `content` in place of the bundle's model. Raises Died."""
    report = probe.probe(replace(sound_bundle, files={**sound_bundle.files, "model.tflite": content}), [])
    assert report.checks
    assert all(detail for _, _, detail in report.checks)
    if report.ok:
        assert report.tuning is not None
        size = (str(report.tuning.batch), str(report.tuning.threads))
        command = [sys.executable, "-c", _AS_THE_DAEMON, *size]
        done = subprocess.run(command, input=content, capture_output=True, check=False, timeout=60)
        if done.returncode != 0:
            raise ProcessDied(f"ended with {done.returncode}: {done.stderr.decode(errors='replace')[-300:]}")
    return report


def numbered_models() -> list[bytes]:
    """Return each model, prefixed by the number of its bundle."""
    return [bytes([number]) + sound_bundle.model_bytes for number, sound_bundle in enumerate(valid_bundles())]


@target("model", "a model with damaged bytes kills only the probe's child", numbered_models, _LONGEST, costly=True)
def damaged(data: bytes) -> None:
    bundles = valid_bundles()
    judge(bundles[data[0] % len(bundles) if data else 0], data[1:])


def changed(data: bytes) -> tuple[Bundle, bytes]:
    """Return the bundle that `data` selects, and its model with a graph mutated by `data`."""
    from scripts.fuzzing import graphs

    random = Random(data)
    sound_bundle = random.choice(valid_bundles())
    return sound_bundle, graphs.mutated(sound_bundle.model_bytes, random)


if all(importlib.util.find_spec(name) for name in ("ai_edge_litert", "flatbuffers")):

    @target(
        "graph",
        "a well-formed model with a wrong graph kills only the probe's child",
        lambda: [bytes([number]) for number in range(3)],
        16,
        costly=True,
    )
    def graph(data: bytes) -> None:
        judge(*changed(data))
