"""Commands on the main loop: each is claimed, done or refused, and answered, once.

Rules, after those of `commands`:
- claimed first, in a commit of its own: its counter and id are used up, whatever happens then
- not expired, by the wall clock; where that is unsynced, by the time floor, and what `NEED_TIME` is refused
- it is a command of ours with its arguments
What it changes in the store, the `audit` message "command" and the answer are one commit. A command that was cut off by
a crash is never taken up again: the next start answers that it was.
"""

from __future__ import annotations

import contextlib
import logging
import queue
from collections.abc import Callable, Mapping
from typing import Any

from agent import clock
from agent.clock import ClockReading, parse_rfc3339
from agent.device.commands.key_rotation import KeyRotation
from agent.device.commands.receiver import CommandReceiver, ReceivedCommand
from agent.device.commands.wipe import DELIVERY_TIMEOUT_S, Wipe
from agent.device.machine.timekeeping import FLOOR
from agent.device.pipeline.tasks import Effect
from agent.device.store.command_log import ClaimedCommand, CommandAnswer
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.errors import OutstationError, RowRejected, StorageError, StorageFull
from agent.wire.commands import CLOCK_DEPENDENT, MAX_LIFETIME_S, check_args
from agent.wire.messages import CommandPayload, encode

log = logging.getLogger("outstation.commands")

_REPLY_OVERHEAD = 1500
_MAX_ARG_CHARS = 256


Action = Callable[[Mapping[str, str], ClockReading], Effect]


class CommandExecutor:
    """Obeys what `Commands` hands over. `actions`: name → what does it; an action raises Rejected to refuse."""

    def __init__(
        self, store: Store, message_log: MessageLog, commands: CommandReceiver, actions: Mapping[str, Action]
    ) -> None:
        self._store, self._message_log, self._commands, self._actions = store, message_log, commands, actions

    def recover(self, now: ClockReading) -> None:
        """Answer what a crash cut off."""
        with contextlib.suppress(StorageFull):
            with self._store.transaction(vital=True) as tx:
                cut_off = tx.commands.unanswered()
            for claimed in cut_off:
                summary = (
                    "The agent stopped while it obeyed this. It is not obeyed again; see the status, and send a new "
                    "command if it is still wanted."
                )
                self._commit_outcome(claimed, "interrupted", Effect(summary), now)

    def tick(self, now: ClockReading) -> int:
        """Obey what waits; how many. Raises StorageError."""
        done = 0
        while True:
            try:
                order = self._commands.received.get_nowait()
            except queue.Empty:
                return done
            self._execute(order, now)
            done += 1

    def _execute(self, received: ReceivedCommand, now: ClockReading) -> None:
        cmd = received.cmd
        try:
            with self._store.transaction(vital=True) as tx:
                claimed = tx.commands.claim(received.kid, cmd.id, cmd.name, cmd.args, cmd.counter, received.correlation)
            if claimed is None:
                log.warning("command %s %s: its id or counter was used before; not obeyed again", cmd.name, cmd.id)
                return
            outcome, deed = self._run_action(cmd, now)
            self._commit_outcome(claimed, outcome, deed, now)
        except StorageFull as full:
            log.error("command %s %s: %s", cmd.name, cmd.id, full)
            summary = f"Not obeyed: {full}. Send it again when there is room."
            self._commands.post_answer(
                CommandAnswer(0, cmd.id, cmd.name, False, summary, {}, received.correlation), now
            )

    def _run_action(self, cmd: CommandPayload, now: ClockReading) -> tuple[str, Effect]:
        try:
            self._validate(cmd, now)
            return "done", self._actions[cmd.name](cmd.args, now)
        except StorageError:
            raise
        except OutstationError as refusal:
            return "refused", Effect(f"Refused: {refusal}")

    def _validate(self, cmd: CommandPayload, now: ClockReading) -> None:
        try:
            issued, expires = parse_rfc3339(cmd.issued), parse_rfc3339(cmd.expires)
            check_args(cmd.name, cmd.args)
        except ValueError as error:
            raise RowRejected(str(error)) from None
        floor = max(clock.BUILD_FLOOR_US, int(self._store.get_meta(FLOOR, "0")))
        reached = max(now.wall_us, floor) if now.quality == "unsynced" else now.wall_us
        if expires - issued > MAX_LIFETIME_S * 1_000_000:
            raise RowRejected(f"it is valid for more than {MAX_LIFETIME_S // 3600} h; sign a shorter one")
        if reached >= expires:
            raise RowRejected(f"it expired at {cmd.expires}, here it is {clock.to_rfc3339(reached)}; send it again")
        if now.quality == "unsynced" and cmd.name in CLOCK_DEPENDENT:
            raise RowRejected(
                f"the clock here is unsynced, so it cannot be told whether this has expired; {cmd.name} is obeyed once "
                "a time service has set the clock"
            )

    def _commit_outcome(self, claimed: ClaimedCommand, outcome: str, effect: Effect, now: ClockReading) -> None:
        """One commit: the effect, the audit message and the answer."""
        ok = outcome == "done"
        with self._store.exclusive():
            with self._store.transaction(vital=True) as tx:
                self._message_log.append(tx, "audit", None, _audit_body(claimed, outcome, effect), now)
                tx.commands.record_answer(claimed, ok, effect.summary[:2000], self._fit_reply(effect.data))
                effect.write(tx)
            effect.after_commit()
        log.info("command %s %s: %s: %s", claimed.name, claimed.id, outcome, effect.summary)
        self._commands.notify_answer()

    def _fit_reply(self, data: dict[str, Any]) -> dict[str, Any]:
        if len(encode(data)) + _REPLY_OVERHEAD <= self._message_log.max_bytes:
            return data
        return {"left_out": "more than the broker takes; raise [broker] max_message_bytes, or see the messages"}


def _audit_body(claimed: ClaimedCommand, outcome: str, effect: Effect) -> dict[str, Any]:
    # A word that was given to confirm with is spent, and of no use to whoever reads the log.
    args = {
        name: text if len(text) <= _MAX_ARG_CHARS else f"{text[:_MAX_ARG_CHARS]}…"
        for name, text in claimed.args.items()
    }
    evidence = {"id": claimed.id, "name": claimed.name[:64], "args": args, "counter": claimed.counter}
    summary = f"Command {claimed.name}: {effect.summary}"[:2000]
    return {"event": "command", "summary": summary, "evidence": {**evidence, "kid": claimed.kid, "outcome": outcome}}


class RemoteCommands:
    """Remote commands as the main loop drives them. `erase` deletes the device's data, with the store closed."""

    def __init__(
        self,
        executor: CommandExecutor,
        receiver: CommandReceiver,
        rotation: KeyRotation,
        wipe: Wipe,
        erase: Callable[[], object],
    ) -> None:
        self._executor, self._receiver, self._rotation = executor, receiver, rotation
        self._wipe, self._erase = wipe, erase

    def start(self, now: ClockReading, wake: Callable[[], None]) -> None:
        """Answer the commands that a crash interrupted; call `wake` when a command arrives."""
        self._receiver.on_received = wake
        self._executor.recover(now)

    def tick(self, now: ClockReading) -> bool:
        """Execute the commands that arrived; return True if there were any."""
        self._rotation.tick(now)
        return self._executor.tick(now) > 0

    @property
    def is_wipe_requested(self) -> bool:
        """True if the device must be erased once the daemon has stopped."""
        return self._wipe.is_confirmed

    def wait_for_wipe(self, now: Callable[[], ClockReading], pause: Callable[[float], object]) -> None:
        """Wait until the collector has the audit message and the answer, or until the time for that is over."""
        end = now().boot_s + DELIVERY_TIMEOUT_S
        while now().boot_s < end and not (self._wipe.is_delivered() and self._receiver.is_idle()):
            pause(0.1)

    def erase(self) -> None:
        self._erase()
