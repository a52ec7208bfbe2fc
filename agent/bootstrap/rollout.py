"""Where roll-outs are put together: what a proved bundle is made into, and where bundles come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from agent.bootstrap import tasks
from agent.config import Config
from agent.device.bundles.crash_marker import Marker
from agent.device.bundles.planning import planned
from agent.device.pipeline import tuning_cache
from agent.device.pipeline.batch import Task
from agent.device.pipeline.tasks import Machine
from agent.device.rollout.desired_state import Desires
from agent.device.rollout.executor import Rollouts
from agent.device.rollout.fetch.fetcher import Fetcher
from agent.device.rollout.serving import Serving
from agent.device.rollout.supply import Supply
from agent.device.rollout.updater import Updating
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.model import activation
from agent.model.activation import Active, Proved
from agent.model.bundle.bundle import Bundle
from agent.model.inference.tuning import Choice
from agent.model.sandbox.subprocess_model import Apart, Bounds
from agent.wire.desired_state import Rules
from agent.wire.keys import PublicKey


class Made:
    """Makes tasks of proved bundles. `waiting` is called while one that runs apart is waited for."""

    def __init__(
        self, file: Path, conf: Config, store: Store, marker: Marker | None, waiting: Callable[[], None]
    ) -> None:
        self._file, self._conf, self._store, self._marker, self._waiting = file, conf, store, marker, waiting

    def here(self, name: str, proved: Proved) -> Task:
        """Loaded into this process. Raises BadBundle, ConfigError."""

        def running(found: Bundle) -> AbstractContextManager[object]:
            return nullcontext() if self._marker is None else self._marker.running(name, found.digest)

        active = activation.load(proved, running)
        self._remember(name, proved)
        return tasks.assemble(self._file, self._conf, self._store, name, active, running)

    def apart(self, name: str, proved: Proved, rules: Rules) -> Task:
        """In a process of its own. Raises BadBundle, ConfigError."""
        self._remember(name, proved)
        model = Apart(proved.bundle, proved.choice, Bounds(call_s=rules.batch_s), self._waiting)
        try:
            active = Active(proved.bundle, model, proved.reference, proved.choice)
            return tasks.assemble(self._file, self._conf, self._store, name, active, lambda found: nullcontext())
        except BaseException:
            model.close()
            raise

    def _remember(self, name: str, proved: Proved) -> None:
        """So that the next start need not try again how its model is run best."""
        if proved.choice is not None:
            tuning_cache.remember(self._store, name, proved.choice)

    def end(self, task: Task) -> None:
        """End a process of its own, if it has one."""
        if isinstance(task.model, Apart):
            task.model.close()


def updating(
    file: Path,
    conf: Config,
    store: Store,
    author: Author,
    desires: Desires,
    trusted: Sequence[PublicKey],
    marker: Marker | None,
    machine: Machine,
    wake: Callable[[], None],
    waiting: Callable[[], None],
) -> Updating:
    """`trusted` publishers; `wake` the main loop; `waiting` is called while a bundle that is tried takes its time."""
    fetcher = None if conf.updates is None else Fetcher(conf, store)
    made = Made(file, conf, store, marker, waiting)

    def fits(task: str, found: Bundle) -> None:
        tasks.check_fields(file, conf, task, found)

    def known(task: str) -> Sequence[Choice]:
        return tuning_cache.known(store, task)

    supplies = {name: Supply(conf, trusted, fetcher, fits, known, wake) for name in conf.tasks}
    serving = Serving(store, author, machine, made, partial(planned, str(file), conf, store))
    rollouts = Rollouts(conf, store, author, desires, serving, supplies)

    def stir() -> None:
        rollouts.stirred = True
        wake()

    desires.changed = stir
    return Updating(rollouts, supplies, fetcher)
