"""Launcher of a daemon with built-in flaws: `python -m scripts.faults.launch FLAW[=VALUE]... -- run -c FILE`.

It injects faults that are impossible from outside, such as a crash at a chosen place or a missing sync. A restarted
daemon has the same flaws.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from outstation.device.capacity import space
from outstation.device.daemon import Daemon
from outstation.device.pipeline.tasks import ScheduledTask
from outstation.device.store.store import Store
from outstation.device.store.tables import schema
from outstation.device.store.transaction import Transaction
from outstation.device.uplink.session import Session
from outstation.foundation import clock
from outstation.ml.model.inference.runtime import TfliteModel
from outstation.ml.model.inference.tuning import model_digest
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel

_Hook = Callable[..., object]
# Delay into a slow call such as the probe.
_INTO_S = 0.3


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class _Countdown:
    """Kill the process at the `occasion`-th call."""

    def __init__(self, occasion: str) -> None:
        self._left = int(occasion)
        self._lock = threading.Lock()

    def __call__(self, *_: object) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                _die()


def _wrap(owner: Any, name: str, *, before: _Hook = lambda *_: None, after: _Hook = lambda *_: None) -> None:
    """Call `before` and `after` around each call of `owner.name`, with its positional arguments."""
    call = getattr(owner, name)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        before(*arguments)
        result = call(*arguments, **keywords)
        after(*arguments)
        return result

    setattr(owner, name, wrapped)


def before_commit(occasion: str) -> None:
    _wrap(Transaction, "finish", after=_Countdown(occasion))


def after_commit(occasion: str) -> None:
    _after_each_commit(_Countdown(occasion))


def after_puback(occasion: str) -> None:
    _wrap(Session, "_handle_receipt", after=_Countdown(occasion))


def in_invoke(occasion: str) -> None:
    count = _Countdown(occasion)
    # Short calls end before the timer fires; the process then dies slightly later.
    _wrap(SubprocessModel, "start_run", before=lambda *_: threading.Timer(random.uniform(0.0, 0.001), count).start())


def in_model(model: str) -> None:
    """End the process by SIGSEGV in each run of a model with this SHA-256, as a runtime bug would."""
    _before_running(model, lambda: os.kill(os.getpid(), signal.SIGSEGV))


def hang_in_model(model: str) -> None:
    """Hang in each run of this model."""
    _before_running(model, lambda: time.sleep(86_400))


def _before_running(model: str, action: Callable[[], None]) -> None:
    def act(loaded: TfliteModel, *_: object) -> None:
        if model_digest(loaded._content) == model:
            action()

    _wrap(TfliteModel, "run", before=act)


def at_step(value: str) -> None:
    """Die once at `WHEN,MODULE:NAME,FILE`, when NAME is called and FILE does not exist yet.

    WHEN is `before` (at the call), `in` (shortly after the call began), `after` (at its return) or `committed` (after
    the commit that contains it).
    """
    when, target, file = value.split(",", 2)
    owner, last, _ = resolve_target(target)
    mark = Path(file)
    reached = threading.Event()

    def die(*_: object) -> None:
        with contextlib.suppress(FileExistsError):
            mark.touch(exist_ok=False)
            _die()

    if when == "before":
        _wrap(owner, last, before=die)
    elif when == "in":
        _wrap(owner, last, before=lambda *_: threading.Timer(_INTO_S, die).start())
    elif when == "after":
        _wrap(owner, last, after=die)
    else:
        _wrap(owner, last, after=lambda *_: reached.set())
        _after_each_commit(lambda: die() if reached.is_set() else None)


def resolve_target(target: str) -> tuple[Any, str, Any]:
    """Return the owner of `MODULE:NAME`, the last part of its name, and the object."""
    module, name = target.split(":")
    owner: Any = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, last, getattr(owner, last)


def _after_each_commit(do: Callable[[], None]) -> None:
    transaction = Store.transaction

    @contextlib.contextmanager
    def doing(self: Store, **keywords: Any) -> Iterator[Transaction]:
        with transaction(self, **keywords) as tx:
            yield tx
        do()

    Store.transaction = doing  # type: ignore[method-assign]


def synchronous(level: str) -> None:
    pragmas = schema.pragmas

    def careless(max_pages: int, wal_bytes: int, _level: str = "FULL") -> schema.Pragmas:
        return pragmas(max_pages, wal_bytes, level)

    schema.pragmas = careless  # type: ignore[assignment]


def vouched_by(folder: str) -> None:
    """Report synchronized time, with the error bound in µs that the file `vouched` in `folder` holds.

    `folder` is a symbolic link that is switched together with the wall clock, so both are read as one.
    """
    link, both, seen = Path(folder), clock._read_both_clocks, threading.local()

    def together() -> tuple[int, float]:
        while True:
            face = os.readlink(link)
            readings = both()
            if os.readlink(link) == face:
                seen.face = link.parent / face
                return readings

    def error_us() -> int | None:
        vouched = getattr(seen, "face", link) / "vouched"
        return int(vouched.read_text(encoding="ascii")) if vouched.exists() else None

    clock._read_both_clocks, clock.sync_error_us = together, error_us


def noted_runs(file: str) -> None:
    """Append a line with the task's name to `file` for each due run, including runs without data."""

    def note(_daemon: Daemon, scheduled: ScheduledTask, *_: object) -> None:
        with Path(file).open("a", encoding="ascii") as lines:
            lines.write(f"{scheduled.task.name}\n")

    _wrap(Daemon, "_record_run", before=note)


def evict_after(seconds: str) -> None:
    space.STALLED_S = float(seconds)


FLAWS: dict[str, Callable[[str], None]] = {
    "die-before-commit": before_commit,
    "die-after-commit": after_commit,
    "die-in-invoke": in_invoke,
    "die-in-model": in_model,
    "hang-in-model": hang_in_model,
    "die-after-puback": after_puback,
    "die-at-step": at_step,
    "synchronous": synchronous,
    "evict-after": evict_after,
    "vouched-by": vouched_by,
    "noted-runs": noted_runs,
}


def main() -> None:
    at = sys.argv.index("--")
    random.seed(" ".join(sys.argv[1:at]))
    for flaw in sys.argv[1:at]:
        name, _, value = flaw.partition("=")
        FLAWS[name](value)
    sys.argv[1:] = sys.argv[at + 1 :]
    from outstation.__main__ import main as outstation

    outstation()


if __name__ == "__main__":
    main()
