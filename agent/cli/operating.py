"""Where what operators can do to a device is put together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from agent.config import Config
from agent.device.author import Author
from agent.device.batch import Task
from agent.device.operating import wipe
from agent.device.operating.actions import TaskActions
from agent.device.operating.commands import Commands
from agent.device.operating.control import Control
from agent.device.operating.keyfiles import KeyFiles
from agent.device.operating.machine import Machine
from agent.device.operating.operations import Operations
from agent.device.operating.rotation import Rotation
from agent.device.operating.wipe import Wipe
from agent.device.storage.store import Store
from agent.device.updates.rollout import Rollouts
from agent.wire import keys


def operations(
    file: Path,
    conf: Config,
    store: Store,
    author: Author,
    commands: Commands,
    files: KeyFiles,
    given: Path,
    load: Callable[[str, Path], Task],
    machine: Machine,
    rollouts: Rollouts,
) -> Operations:
    """`given` is the file of the key that the device was given, `load` loads a task's bundle from a path."""
    from agent.cli import status

    rotation = Rotation(store, author, files, commands.post, machine.renew)
    wiping = Wipe(store, author, machine.halt)
    tasks = TaskActions(str(file), conf, store, author, machine, load, lambda: status.document(conf, store), rollouts)
    actions = {**tasks.by_name(), "rotate-key": rotation.rotate, "wipe": wiping.command}
    control = Control(store, author, commands, actions)
    return Operations(control, commands, rotation, wiping, partial(erase, file, conf, given))


def erase(file: Path, conf: Config, given: Path) -> dict[str, Any]:
    """Everything of the device's, with the store closed; what the marker file then says."""
    own_keys = [given, keys.beside(given)]
    return wipe.erase(conf.data_dir, wipe.spared(file, conf), own_keys)
