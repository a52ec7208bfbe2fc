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

import msgspec

from agent import clock
from agent.clock import Now, epoch_us
from agent.device.commands.receiver import Commands, Order
from agent.device.machine.timekeeping import FLOOR
from agent.device.store.command_log import Answer, Claimed
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import OutstationError, Rejected, StorageError, StorageFull
from agent.wire.commands import MAX_LIFETIME_S, NEED_TIME, check_args
from agent.wire.messages import Cmd, encode

log = logging.getLogger("outstation.commands")

_REPLY_HEAD = 1500
_SHOWN = 256


class Deed(msgspec.Struct, frozen=True):
    """What a command came to: `write` is committed with the answer, `then` follows before anybody else writes."""

    summary: str
    data: dict[str, Any] = msgspec.field(default_factory=dict)
    write: Callable[[Transaction], object] = lambda tx: None
    then: Callable[[], object] = lambda: None


Action = Callable[[Mapping[str, str], Now], Deed]


class Control:
    """Obeys what `Commands` hands over. `actions`: name → what does it; an action raises Rejected to refuse."""

    def __init__(self, store: Store, author: Author, commands: Commands, actions: Mapping[str, Action]) -> None:
        self._store, self._author, self._commands, self._actions = store, author, commands, actions

    def recover(self, now: Now) -> None:
        """Answer what a crash cut off."""
        with contextlib.suppress(StorageFull):
            with self._store.transaction(vital=True) as tx:
                cut_off = tx.commands.unanswered()
            for claimed in cut_off:
                summary = (
                    "The agent stopped while it obeyed this. It is not obeyed again; see the status, and send a new "
                    "command if it is still wanted."
                )
                self._finish(claimed, "interrupted", Deed(summary), now)

    def turn(self, now: Now) -> int:
        """Obey what waits; how many. Raises StorageError."""
        done = 0
        while True:
            try:
                order = self._commands.orders.get_nowait()
            except queue.Empty:
                return done
            self._obey(order, now)
            done += 1

    def _obey(self, order: Order, now: Now) -> None:
        cmd = order.cmd
        try:
            with self._store.transaction(vital=True) as tx:
                claimed = tx.commands.claim(order.kid, cmd.id, cmd.name, cmd.args, cmd.counter, order.correlation)
            if claimed is None:
                log.warning("command %s %s: its id or counter was used before; not obeyed again", cmd.name, cmd.id)
                return
            outcome, deed = self._do(cmd, now)
            self._finish(claimed, outcome, deed, now)
        except StorageFull as full:
            log.error("command %s %s: %s", cmd.name, cmd.id, full)
            summary = f"Not obeyed: {full}. Send it again when there is room."
            self._commands.post_answer(Answer(0, cmd.id, cmd.name, False, summary, {}, order.correlation), now)

    def _do(self, cmd: Cmd, now: Now) -> tuple[str, Deed]:
        try:
            self._check(cmd, now)
            return "done", self._actions[cmd.name](cmd.args, now)
        except StorageError:
            raise
        except OutstationError as refusal:
            return "refused", Deed(f"Refused: {refusal}")

    def _check(self, cmd: Cmd, now: Now) -> None:
        try:
            issued, expires = epoch_us(cmd.issued), epoch_us(cmd.expires)
            check_args(cmd.name, cmd.args)
        except ValueError as error:
            raise Rejected(str(error)) from None
        floor = max(clock.BUILD_FLOOR_US, int(self._store.meta(FLOOR, "0")))
        reached = max(now.wall_us, floor) if now.quality == "unsynced" else now.wall_us
        if expires - issued > MAX_LIFETIME_S * 1_000_000:
            raise Rejected(f"it is valid for more than {MAX_LIFETIME_S // 3600} h; sign a shorter one")
        if reached >= expires:
            raise Rejected(f"it expired at {cmd.expires}, here it is {clock.rfc3339(reached)}; send it again")
        if now.quality == "unsynced" and cmd.name in NEED_TIME:
            raise Rejected(
                f"the clock here is unsynced, so it cannot be told whether this has expired; {cmd.name} is obeyed once "
                "a time service has set the clock"
            )

    def _finish(self, claimed: Claimed, outcome: str, deed: Deed, now: Now) -> None:
        """One commit: the effect, the audit message and the answer."""
        ok = outcome == "done"
        with self._store.alone():
            with self._store.transaction(vital=True) as tx:
                self._author.write(tx, "audit", None, _audit(claimed, outcome, deed), now)
                tx.commands.answer(claimed, ok, deed.summary[:2000], self._fitting(deed.data))
                deed.write(tx)
            deed.then()
        log.info("command %s %s: %s: %s", claimed.name, claimed.id, outcome, deed.summary)
        self._commands.answered()

    def _fitting(self, data: dict[str, Any]) -> dict[str, Any]:
        if len(encode(data)) + _REPLY_HEAD <= self._author.max_bytes:
            return data
        return {"left_out": "more than the broker takes; raise [broker] max_message_bytes, or see the messages"}


def _audit(claimed: Claimed, outcome: str, deed: Deed) -> dict[str, Any]:
    # A word that was given to confirm with is spent, and of no use to whoever reads the log.
    args = {name: text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…" for name, text in claimed.args.items()}
    evidence = {"id": claimed.id, "name": claimed.name[:64], "args": args, "counter": claimed.counter}
    summary = f"Command {claimed.name}: {deed.summary}"[:2000]
    return {"event": "command", "summary": summary, "evidence": {**evidence, "kid": claimed.kid, "outcome": outcome}}
