"""Command executor: claims, executes or refuses, and answers each remote command once, on the main loop.

Rules, after those of the receiver:
- A command is claimed first, in a commit of its own: its counter and id are then used, whatever follows.
- It has not expired by the wall clock. While that is unsynced, the time floor counts instead, and commands in
  `CLOCK_DEPENDENT` are refused.
- Its name and arguments are known, its key is still trusted, and the role of the key may send it.

Its changes in the store, the audit message "command" and the answer are one commit. A command that a crash interrupted
is never executed again: the next start answers that it was interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import queue
from collections.abc import Callable, Mapping
from typing import Any

from outstation.device.commands.key_rotation import KeyRotation
from outstation.device.commands.receiver import CommandReceiver, ReceivedCommand
from outstation.device.commands.wipe import DELIVERY_TIMEOUT_S, Wipe
from outstation.device.machine.timekeeping import FLOOR
from outstation.device.pipeline.tasks import Effect
from outstation.device.store.command_log import ClaimedCommand, CommandAnswer
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.uplink.refusals import counter_names
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading, parse_rfc3339
from outstation.foundation.errors import OutstationError, RowRejected, StorageError, StorageFull
from outstation.protocol.wire.commands import CLOCK_DEPENDENT, MAX_LIFETIME_S, check_args, may_command
from outstation.protocol.wire.jws import encode
from outstation.protocol.wire.messages import CommandPayload

log = logging.getLogger("outstation.commands")

_REPLY_OVERHEAD = 1500
_MAX_ARG_CHARS = 256


Action = Callable[[Mapping[str, str], ClockReading], Effect]
# An action whose effect depends on which key signed the command; it gets the kid, too.
SignerAction = Callable[[Mapping[str, str], ClockReading, str], Effect]


class CommandExecutor:
    """Executes the commands of the receiver. `actions` maps names to functions, which raise RowRejected to refuse."""

    def __init__(
        self,
        store: Store,
        message_log: MessageLog,
        commands: CommandReceiver,
        actions: Mapping[str, Action],
        signer_actions: Mapping[str, SignerAction],
    ) -> None:
        self._store, self._message_log, self._commands = store, message_log, commands
        self._actions, self._signer_actions = actions, signer_actions

    def recover(self, now: ClockReading) -> None:
        """Answer the commands that a crash interrupted."""
        with contextlib.suppress(StorageFull):
            with self._store.transaction(vital=True) as tx:
                interrupted = tx.commands.unanswered()
            for claimed in interrupted:
                summary = (
                    "The daemon stopped while it executed this command, and does not execute it again. Look at the "
                    "status, and send a new command if it is still wanted."
                )
                self._commit_outcome(claimed, "interrupted", Effect(summary), now)

    def tick(self, now: ClockReading) -> int:
        """Execute the commands that wait; return their number. Raises StorageError."""
        count = 0
        while True:
            try:
                received = self._commands.received.get_nowait()
            except queue.Empty:
                return count
            self._execute(received, now)
            count += 1

    def _execute(self, received: ReceivedCommand, now: ClockReading) -> None:
        cmd = received.cmd
        try:
            with self._store.transaction(vital=True) as tx:
                claimed = tx.commands.claim(received.kid, cmd, received.correlation)
                for counter in () if claimed else counter_names(self._commands.refusal_name, "replayed"):
                    tx.increment_counter(counter, 1)
            if claimed is None:
                log.warning("command %s %s: its id or counter was used before; not executed again", cmd.name, cmd.id)
                return
            outcome, effect = self._run_action(received, now)
            self._commit_outcome(claimed, outcome, effect, now)
        except StorageFull as full:
            log.error("command %s %s: %s", cmd.name, cmd.id, full)
            summary = f"Not executed: {full}. Send it again when there is room."
            answer = CommandAnswer(0, cmd.id, cmd.name, False, summary, {}, received.correlation, cmd.reply_key)
            self._commands.post_answer(answer, now)

    def _run_action(self, received: ReceivedCommand, now: ClockReading) -> tuple[str, Effect]:
        cmd = received.cmd
        try:
            self._check_role(received)
            self._validate(cmd, now)
            if (signer_action := self._signer_actions.get(cmd.name)) is not None:
                return "done", signer_action(cmd.args, now, received.kid)
            return "done", self._actions[cmd.name](cmd.args, now)
        except StorageError:
            raise
        except OutstationError as refusal:
            return "refused", Effect(f"Refused: {refusal}")

    def _check_role(self, received: ReceivedCommand) -> None:
        signer, name = self._commands.trusted.find_commander(received.kid), received.cmd.name
        if signer is None:
            raise RowRejected("the key that signed this was revoked meanwhile")
        if not may_command(signer.owner, name):
            raise RowRejected(f"the key that signed this is a {signer.owner}; it may not send {name[:60]}")

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
                f"the clock here is unsynced, so the device cannot tell whether this has expired; {cmd.name} is "
                "executed once a time service has set the clock"
            )

    def _commit_outcome(self, claimed: ClaimedCommand, outcome: str, effect: Effect, now: ClockReading) -> None:
        """Commit the effect, the audit message and the answer together."""
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
        return {"left_out": "the answer is larger than [broker] max_message_bytes; raise it, or look at the messages"}


def _audit_body(claimed: ClaimedCommand, outcome: str, effect: Effect) -> dict[str, Any]:
    # A confirmation word is already used, so it may stand in the log.
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
        self._wipe.tick(now)
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
