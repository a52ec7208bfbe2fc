"""Checks of an interoperability run, printed with the time since its start, and the folder of what a run installs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "outstation"


class Steps:
    def __init__(self) -> None:
        self._start_s = time.monotonic()

    def report(self, text: str) -> None:
        print(f"  {time.monotonic() - self._start_s:6.1f} s  {text}", flush=True)

    def wait(self, text: str, condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
        """Wait until `condition` returns something, and report it. Raises AssertionError after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"{text}: not within {timeout_s:g} s")
            time.sleep(0.5)
        self.report(f"{text}: {value}" if isinstance(value, str) else text)
        return value
