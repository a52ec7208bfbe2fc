"""Where what operators can do to a device is put together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from agent.config import Config
from agent.device.commands import wipe
from agent.device.commands.actions import TaskActions
from agent.device.commands.executor import Control
from agent.device.commands.key_rotation import Rotation
from agent.device.commands.operations import Operations
from agent.device.commands.receiver import Commands
from agent.device.commands.wipe import Wipe
from agent.device.machine.keys import KeyFiles
from agent.device.pipeline.batch import Task
from agent.device.pipeline.tasks import Machine
from agent.device.rollout.executor import Rollouts
from agent.device.store.message_log import Author
from agent.device.store.store import Store
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
    from agent.cli.device import status

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
