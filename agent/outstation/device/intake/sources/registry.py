"""Source registry: one line for each config section and the module that checks and builds it.

Modules are imported when a stream needs them: some load libraries that most devices do not use.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import cast

from outstation.device.config.sources import (
    ExecSource,
    FilesSource,
    HostSource,
    MqttSource,
    ReplaySource,
    SourceSection,
)
from outstation.device.intake.source import SourceModule

_MODULES: dict[type[SourceSection], Callable[[], ModuleType]] = {
    ExecSource: lambda: import_module("outstation.device.intake.sources.exec"),
    FilesSource: lambda: import_module("outstation.device.intake.sources.files"),
    HostSource: lambda: import_module("outstation.device.intake.sources.host"),
    MqttSource: lambda: import_module("outstation.device.intake.sources.mqtt"),
    ReplaySource: lambda: import_module("outstation.device.intake.sources.replay"),
}


def source_module(source: SourceSection) -> SourceModule | None:
    """Return the module of a config section; None if producers fill the stream through the socket."""
    load = _MODULES.get(type(source))
    return None if load is None else cast(SourceModule, load())
