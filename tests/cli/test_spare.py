"""The spare model process: started only for a command that will run a model in a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from outstation.device.cli import spare
from outstation.device.cli.init import TEMPLATE
from outstation.ml.model.sandbox import launch

TASK = """
[tasks.sort]
stream = "host"
bundle = "sort.bundle"
"""


pytestmark = pytest.mark.process


def starts_one(config: Path) -> bool:
    with spare.prepared(str(config)):
        started = launch._spare
        assert started is None or started.child.poll() is None
    assert launch._spare is None
    assert started is None or started.child.poll() is not None
    return started is not None


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "outstation.toml"
    file.write_text(TEMPLATE.format(device="pi-07", fleet="acme", data_dir="data", collector="") + TASK)
    return file


def test_a_process_waits_for_the_first_model_of_a_device(config: Path) -> None:
    assert starts_one(config)


@pytest.mark.parametrize(
    "changed",
    [
        lambda text: text + '[models]\nconfinement = "off"\n',
        lambda text: text.removesuffix(TASK),
        lambda text: text + "[unknown\n",
        lambda text: "models = 1\n" + text,
        lambda text: text.replace('data_dir = "data"', "data_dir = 1"),
    ],
)
def test_none_is_started_for_a_device_that_runs_no_model_in_a_process(config: Path, changed: object) -> None:
    assert callable(changed)
    config.write_text(changed(config.read_text()))
    assert not starts_one(config)


def test_none_is_started_without_a_config(tmp_path: Path) -> None:
    assert not starts_one(tmp_path / "missing.toml")
