"""Composition root of rollouts: how a proven bundle becomes a task, and where bundles come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from outstation.device.bootstrap import tasks
from outstation.device.bootstrap.model_host import ModelHost
from outstation.device.bundles.quarantine import CrashMarker
from outstation.device.config import Config
from outstation.device.pipeline import tuning_cache
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.pipeline.tasks import Runtime, make_scheduled_task
from outstation.device.rollout.desired_state import DesiredStateStore
from outstation.device.rollout.executor import RolloutExecutor
from outstation.device.rollout.fetch.fetcher import Fetcher
from outstation.device.rollout.serving import ServingManager
from outstation.device.rollout.supply import BundleSupply
from outstation.device.rollout.updater import BundleUpdater
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.ml.model.activation import LoadedBundle, ProvenBundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.sandbox.probe import ProbeReport
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel
from outstation.protocol.wire.desired_state import CanaryRules
from outstation.protocol.wire.keys import PublicKey


class TaskFactory:
    """Makes tasks of proven bundles; `on_wait` is called while the daemon waits for a subprocess model."""

    def __init__(
        self,
        file: Path,
        conf: Config,
        store: Store,
        marker: CrashMarker | None,
        host: ModelHost,
        on_wait: Callable[[], None],
    ) -> None:
        self._file, self._conf, self._store, self._marker = file, conf, store, marker
        self._host, self._on_wait = host, on_wait

    def start(self, name: str, proven: ProvenBundle, rules: CanaryRules | None = None) -> LoadedTask:
        """Start the model, as a candidate within the timeout of `rules`. Raises BadBundle, ConfigError."""

        def guard_run(loaded_bundle: Bundle) -> AbstractContextManager[object]:
            return nullcontext() if self._marker is None else self._marker.guard_run(name, loaded_bundle.digest)

        self._save_tuning(name, proven)
        policy = tasks.model_policy(self._conf)
        if rules is None:
            active = self._host.load(proven, guard_run, policy, self._on_wait)
        else:
            model = self._host.start_candidate(proven, policy, self._on_wait, rules.batch_timeout_s)
            active = LoadedBundle(proven.bundle, proven.reference, proven.tuning, model)
        return tasks.build_task(self._file, self._conf, self._store, name, active, guard_run)

    def _save_tuning(self, name: str, proved: ProvenBundle) -> None:
        """Save the tuning, so that the next start need not tune again."""
        if proved.tuning is not None:
            tuning_cache.save(self._store, name, proved.tuning)

    def stop(self, task: LoadedTask) -> None:
        """End the task's subprocess, if it has one."""
        if isinstance(task.model, SubprocessModel):
            task.model.close()


def build_updater(
    file: Path,
    conf: Config,
    store: Store,
    message_log: MessageLog,
    desired_states: DesiredStateStore,
    publishers: Callable[[], Sequence[PublicKey]],
    marker: CrashMarker | None,
    host: ModelHost,
    wake: Callable[[], None],
    runtime: Runtime,
    on_wait: Callable[[], None],
) -> BundleUpdater:
    """Build the updater; `wake` ends a wait of the main loop, `on_wait` is called while a subprocess model runs."""
    fetcher = None if conf.updates is None else Fetcher(conf, store)
    check_fit, policy = partial(tasks.check_fields, file, conf), tasks.model_policy(conf)

    def probe(task: str, verified: Bundle) -> ProbeReport:
        return host.probe(verified, tuning_cache.load(store, task), policy)

    supplies = {
        name: BundleSupply(conf, publishers, fetcher, check_fit, probe, host.start_job, wake) for name in conf.tasks
    }
    schedule = partial(make_scheduled_task, str(file), conf, store)
    factory = TaskFactory(file, conf, store, marker, host, on_wait)
    serving = ServingManager(store, message_log, runtime, factory, schedule)
    rollouts = RolloutExecutor(conf, store, message_log, desired_states, serving, supplies)

    def wake_rollouts() -> None:
        rollouts.wake_requested = True
        wake()

    desired_states.on_change = wake_rollouts
    return BundleUpdater(rollouts, supplies, fetcher)
