"""Everything operators can do to a running device, put together for the daemon."""

from __future__ import annotations

from collections.abc import Callable

from agent.clock import ClockReading
from agent.device.commands.executor import CommandExecutor
from agent.device.commands.key_rotation import KeyRotation
from agent.device.commands.receiver import CommandReceiver
from agent.device.commands.wipe import DELIVERY_TIMEOUT_S, Wipe


class RemoteCommands:
    """Called by the main loop. `erase` deletes the device's data, with the store closed."""

    def __init__(
        self,
        control: CommandExecutor,
        commands: CommandReceiver,
        rotation: KeyRotation,
        wipe: Wipe,
        erase: Callable[[], object],
    ) -> None:
        self._control, self._commands, self._rotation, self._wipe, self._erase = (
            control,
            commands,
            rotation,
            wipe,
            erase,
        )

    def start(self, now: ClockReading, wake: Callable[[], None]) -> None:
        """Answer what a crash cut off; call `wake` when a command comes."""
        self._commands.on_received = wake
        self._control.recover(now)

    def tick(self, now: ClockReading) -> bool:
        """Obey what came; whether there was anything."""
        self._rotation.tick(now)
        return self._control.tick(now) > 0

    @property
    def is_wipe_requested(self) -> bool:
        """Whether all is to be erased once the daemon has stopped."""
        return self._wipe.is_confirmed

    def wait_for_wipe(self, now: Callable[[], ClockReading], pause: Callable[[float], object]) -> None:
        """Until the collector knows, or for as long as that can be waited for."""
        end = now().boot_s + DELIVERY_TIMEOUT_S
        while now().boot_s < end and not (self._wipe.is_delivered() and self._commands.is_idle()):
            pause(0.1)

    def erase(self) -> None:
        self._erase()
