"""Spare model process: a fork of this process, which imports the runtime while this process imports everything else.

This module imports little: the process starts before the command line, the config and their libraries are loaded.
"""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from outstation.foundation import input_files
from outstation.foundation.owner import become_owner, is_of_another_user
from outstation.ml.model.sandbox import launch


@contextlib.contextmanager
def prepared(config_file: str | None) -> Iterator[None]:
    """Start the process of a command's first model, with the rights of the device's owner; end it if none needed it.

    None is started if the device has no task, or runs models in the daemon. Raises UsageError, but not for a wrong
    config: the command reports that.
    """
    try:
        # Before the config is read, which may hold a password: the fork has a copy of all memory.
        launch.fork_spare()
        _prepare(config_file)
        yield
    finally:
        launch.discard_spare()


def _prepare(config_file: str | None) -> None:
    """Have one spare process, with the rights of the device's owner, if the config needs one. Raises UsageError."""
    path, document = _read_config(config_file)
    device, models = document.get("device"), document.get("models", {})
    if isinstance(device, dict) and isinstance(models, dict) and document.get("tasks"):
        data_dir = device.get("data_dir", input_files.DATA_DIR)
        if isinstance(data_dir, str) and models.get("confinement") != "off":
            folder = path.resolve().parent / data_dir
            if is_of_another_user(folder):
                # The fork is root's, whom the owner could not end.
                launch.discard_spare()
            become_owner(folder)
            launch.prepare_spare()
            return
    launch.discard_spare()


def _read_config(config_file: str | None) -> tuple[Path, dict[str, Any]]:
    """Return path and content of the config that `config_file` names; no content if it cannot be read."""
    path = Path()
    try:
        path = input_files.find_config(config_file)
        return path, tomllib.loads(input_files.read_text(path))
    except (OSError, ValueError, RecursionError):
        return path, {}
