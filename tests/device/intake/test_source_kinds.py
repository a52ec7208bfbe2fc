"""Kinds of sources: every kind in the config has a module that checks and builds it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from outstation.device.config.sources import SOURCES, SocketSource, SourceConfig

ROOT = Path(__file__).parents[3]
KINDS = [section.__struct_config__.tag for section in get_args(SourceConfig) if section is not SocketSource]


def test_every_kind_of_the_config_is_shipped_and_no_other() -> None:
    assert set(SOURCES) == {*KINDS, "socket"}
    assert SOURCES.load("socket", "outstation.toml", "streams.a.source.kind") is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_has_both_functions(kind: str) -> None:
    module = SOURCES.load(kind, "outstation.toml", "streams.a.source.kind")
    assert list(inspect.signature(module.check).parameters) == ["context", "source"]
    assert list(inspect.signature(module.build).parameters) == ["context", "source", "store"]


def test_the_config_loads_no_source() -> None:
    code = "import sys; from outstation.device.config import config; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    modules = {f"outstation.device.intake.sources.{kind}" for kind in KINDS}
    assert set(done.stdout.splitlines()) & {*modules, "psutil", "paho", "importlib.metadata"} == set()
