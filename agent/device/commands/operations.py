"""Everything operators can do to a running device, put together for the daemon."""

from __future__ import annotations

from collections.abc import Callable

from agent.clock import Now
from agent.device.commands.executor import Control
from agent.device.commands.key_rotation import Rotation
from agent.device.commands.receiver import Commands
from agent.device.commands.wipe import DELIVER_WITHIN_S, Wipe


class Operations:
    """Called by the main loop. `erase` deletes the device's data, with the store closed."""

    def __init__(
        self, control: Control, commands: Commands, rotation: Rotation, wipe: Wipe, erase: Callable[[], object]
    ) -> None:
        self._control, self._commands, self._rotation, self._wipe, self._erase = (
            control,
            commands,
            rotation,
            wipe,
            erase,
        )

    def start(self, now: Now, wake: Callable[[], None]) -> None:
        """Answer what a crash cut off; call `wake` when a command comes."""
        self._commands.arrived = wake
        self._control.recover(now)

    def turn(self, now: Now) -> bool:
        """Obey what came; whether there was anything."""
        self._rotation.turn(now)
        return self._control.turn(now) > 0

    @property
    def wiping(self) -> bool:
        """Whether all is to be erased once the daemon has stopped."""
        return self._wipe.requested

    def wait_for_wipe(self, now: Callable[[], Now], pause: Callable[[float], object]) -> None:
        """Until the collector knows, or for as long as that can be waited for."""
        end = now().boot_s + DELIVER_WITHIN_S
        while now().boot_s < end and not (self._wipe.delivered() and self._commands.idle()):
            pause(0.1)

    def erase(self) -> None:
        self._erase()
