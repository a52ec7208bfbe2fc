"""Where what operators can do to a device is put together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from agent.config import Config
from agent.device.commands import wipe
from agent.device.commands.actions import TaskActions
from agent.device.commands.executor import CommandExecutor
from agent.device.commands.key_rotation import KeyRotation
from agent.device.commands.operations import RemoteCommands
from agent.device.commands.receiver import CommandReceiver
from agent.device.commands.wipe import Wipe
from agent.device.machine.keys import KeyFiles
from agent.device.pipeline.batch import LoadedTask
from agent.device.pipeline.tasks import Runtime
from agent.device.rollout.executor import RolloutExecutor
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.wire import keys


def build_operations(
    file: Path,
    conf: Config,
    store: Store,
    author: MessageLog,
    commands: CommandReceiver,
    files: KeyFiles,
    device_key_file: Path,
    load: Callable[[str, Path], LoadedTask],
    machine: Runtime,
    rollouts: RolloutExecutor,
) -> RemoteCommands:
    """`given` is the file of the key that the device was given, `load` loads a task's bundle from a path."""
    from agent.cli.device import status

    rotation = KeyRotation(store, author, files, commands.post, machine.reconnect)
    wiping = Wipe(store, author, machine.halt)
    tasks = TaskActions(
        str(file), conf, store, author, machine, load, lambda: status.build_document(conf, store), rollouts
    )
    actions = {**tasks.by_name(), "rotate-key": rotation.rotate, "wipe": wiping.request}
    control = CommandExecutor(store, author, commands, actions)
    return RemoteCommands(control, commands, rotation, wiping, partial(erase_device, file, conf, device_key_file))


def erase_device(file: Path, conf: Config, device_key_file: Path) -> dict[str, Any]:
    """Everything of the device's, with the store closed; what the marker file then says."""
    own_keys = [device_key_file, keys.public_key_path(device_key_file)]
    return wipe.erase(conf.data_dir, wipe.installation_files(file, conf), own_keys)
