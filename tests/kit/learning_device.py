"""Device folder as `outstation init` makes it, with a task that learns its reference, used by the test's process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from outstation.device.bootstrap.device import load_config
from tests.kit.commands import call_outstation

_CONFIG = """
[streams.watch]
fields = [{ name = "ax" }, { name = "ay" }, { name = "az" }, { name = "wx" }, { name = "wy" }, { name = "wz" }]
[tasks.exercise]
stream = "watch"
bundle = "exercise"
learn_windows = 20
"""


class LearningDevice:
    """Device `pi-07` in `folder`; its task `exercise` learns from 20 drift windows of stream `watch`."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "device"
        assert call_outstation("init", str(self.home), "--id", "pi-07").returncode == 0
        self.config = self.home / "outstation.toml"
        head = self.config.read_text(encoding="utf-8").split("[streams.")[0]
        self.config.write_text(head + _CONFIG, encoding="utf-8")
        self.file, self.conf = load_config(str(self.config))
        self.data = Path(self.conf.data_dir)

    def call(self, *arguments: str) -> tuple[int, Any]:
        """Return the exit code of a command about this device, and its JSON document or its error."""
        done = call_outstation(*arguments, "-c", str(self.config), "--json")
        return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr
