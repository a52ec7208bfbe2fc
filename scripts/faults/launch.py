"""The daemon with a flaw built in: `python -m scripts.faults.launch FLAW[=VALUE]... -- run -c FILE`.

For faults that cannot be had from outside: death at a chosen place in the code, a store that syncs less than it should.
The flaws are read from the environment again by nothing: a restarted daemon has them too.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from agent.device.session import Session
from agent.device.store import Store
from agent.device.transaction import Transaction
from agent.model.runtime import Model


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class _Countdown:
    """Dies at its n-th call, n at random up to `most`; a restarted daemon draws anew."""

    def __init__(self, most: int) -> None:
        self._left = random.SystemRandom().randint(1, most)
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                _die()


def before_commit(most: str) -> None:
    count, finish = _Countdown(int(most)), Transaction.finish

    def dying(self: Transaction) -> None:
        finish(self)
        count()

    Transaction.finish = dying  # type: ignore[method-assign]


def after_commit(most: str) -> None:
    count, transaction = _Countdown(int(most)), Store.transaction

    @contextlib.contextmanager
    def dying(self: Store) -> Iterator[Transaction]:
        with transaction(self) as tx:
            yield tx
        count()

    Store.transaction = dying  # type: ignore[method-assign]


def in_invoke(most: str) -> None:
    count, invoke = _Countdown(int(most)), Model.invoke

    def dying(self: Model, *arguments: Any) -> Any:
        # Some are over before the timer fires; then it dies a little after.
        threading.Timer(random.uniform(0.0, 0.001), count).start()
        return invoke(self, *arguments)

    Model.invoke = dying  # type: ignore[method-assign, assignment]


def after_puback(most: str) -> None:
    count, settle = _Countdown(int(most)), Session._settle

    def dying(self: Session, *arguments: Any) -> None:
        settle(self, *arguments)
        count()

    Session._settle = dying  # type: ignore[method-assign, assignment]


FLAWS: dict[str, Callable[[str], None]] = {
    "die-before-commit": before_commit,
    "die-after-commit": after_commit,
    "die-in-invoke": in_invoke,
    "die-after-puback": after_puback,
}


def main() -> None:
    at = sys.argv.index("--")
    for flaw in sys.argv[1:at]:
        name, _, value = flaw.partition("=")
        FLAWS[name](value)
    sys.argv[1:] = sys.argv[at + 1 :]
    from agent.cli import main as outstation

    outstation()


if __name__ == "__main__":
    main()
