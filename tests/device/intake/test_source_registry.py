"""Source registry: every kind of source in the config has a module that checks and builds it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from outstation.device.config.sources import SocketSource, SourceConfig, SourceSection
from outstation.device.intake.sources import registry
from outstation.device.intake.sources.registry import source_module

ROOT = Path(__file__).parents[3]
KINDS = [kind for kind in get_args(SourceConfig) if kind is not SocketSource]


def test_every_kind_but_the_socket_is_registered() -> None:
    assert set(registry._MODULES) == set(KINDS)
    assert source_module(SocketSource()) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_is_named_after_its_kind_and_has_both_functions(kind: type[SourceSection]) -> None:
    module = registry._MODULES[kind]()
    assert module.__name__.rpartition(".")[2] == kind.__struct_config__.tag
    assert list(inspect.signature(module.check).parameters) == ["context", "source"]
    assert list(inspect.signature(module.build).parameters) == ["context", "source", "store"]


def test_the_registry_loads_no_source() -> None:
    code = "import sys; from outstation.device.intake.sources import registry; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.splitlines())
    modules = {f"outstation.device.intake.sources.{kind.__struct_config__.tag}" for kind in KINDS}
    assert loaded & {*modules, "psutil", "paho"} == set()
