"""Roll-outs of a device's tasks: the deeds to what `decide` decides, on the main loop, one step a commit.

What is in memory follows from what is in the store: a device that died between any two steps looks at how its task
stands, has the bundle proved again, and goes on from there. Which bundle answers changes between two batches only, in
one commit with the message that says so; the task's cursor knows nothing of bundles.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace as changed

from msgspec.structs import replace

from agent import clock
from agent.clock import ClockReading
from agent.config import Config
from agent.device.bundles import history
from agent.device.bundles import rollout_state as standings
from agent.device.bundles.rollout_state import HoldOff, RolloutState
from agent.device.pipeline import drift_state
from agent.device.pipeline.loaded_task import LoadedTask
from agent.device.pipeline.tasks import Effect
from agent.device.rollout import saved_drift, transitions
from agent.device.rollout.desired_state import DesiredStateStore
from agent.device.rollout.facts import FactCollector
from agent.device.rollout.serving import ServingManager, TaskRollout
from agent.device.rollout.state_machine import BundleAssessment, decide_next_state
from agent.device.rollout.supply import BundleSupply
from agent.device.store import task_keys
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import BadBundle, ConfigError, ModelProcessFailed, StorageBusy, StorageError, StorageFull

log = logging.getLogger("outstation.updates")

_POLL_INTERVAL_S, _STORE_FULL_RETRY_S, _ERROR_BACKOFF_S = 1.0, 10.0, 60.0
# Two are the most that a change of mind takes; the rest is for safety.
_MAX_STEPS_PER_TICK = 6


class RolloutExecutor:
    """Of one device. Used by the main loop."""

    def __init__(
        self,
        conf: Config,
        store: Store,
        author: MessageLog,
        desired_state: DesiredStateStore,
        serving: ServingManager,
        supplies: Mapping[str, BundleSupply],
    ) -> None:
        self._conf, self._store, self._author, self._serving = conf, store, author, serving
        self._fact_collector = FactCollector(conf, store, author.device, desired_state, serving)
        self._rollouts = {
            name: TaskRollout(
                name,
                supplies[name],
                standings.load_state(store, name),
                standings.load_hold_offs(store, name),
                history.configured_digest(task.bundle, conf.data_dir),
            )
            for name, task in conf.tasks.items()
        }
        self._next_tick_s = 0.0
        self.wake_requested = False

    # --- on the main loop ---

    def tick(self, now: ClockReading) -> bool:
        """Go on with every roll-out; whether anything was written."""
        if now.boot_s < self._next_tick_s and not self.wake_requested:
            return False
        self.wake_requested, self._next_tick_s = False, now.boot_s + _POLL_INTERVAL_S
        wrote = [self._advance(name, now) for name in self._rollouts]
        return any(wrote)

    def wait_s(self, now: ClockReading) -> float:
        """Until `turn` may have something to do."""
        return (
            max(0.0, self._next_tick_s - now.boot_s)
            if any(self._is_in_progress(one) for one in self._rollouts.values())
            else 60.0
        )

    def is_resuming(self, name: str) -> bool:
        """Whether the bundle that answers for this task is on its way into memory, after a start: the task waits."""
        live = self._rollouts.get(name)
        return live is not None and _phase(live) == "probation" and live.canary is None

    def on_batch_committed(self, name: str, now: ClockReading) -> None:
        """A batch of the task was committed."""
        if self._rollouts[name].canary is not None:
            self._advance(name, now)

    def on_canary_failure(self, name: str, failure: ModelProcessFailed, now: ClockReading) -> LoadedTask | None:
        """The bundle on probation gave no answers to a batch: who answers it instead, None where nobody can."""
        live = self._rollouts[name]
        trial = live.canary
        if trial is None or not trial.is_serving:
            return None
        trial.record_failure(failure)
        log.error("task %s: the bundle on probation: %s", name, failure)
        self._advance(name, now)
        if live.canary is None:
            return self._serving.find_task(name)
        # It may fail now and then: the one before answers for once, and learns nothing from what it sees in between.
        return (
            None
            if trial.incumbent is None
            else changed(trial.incumbent, drift_monitor=None, drift_state=None, batch_observer=trial)
        )

    def plan_rollback(self, name: str, now: ClockReading) -> Effect | None:
        """What an operator's `rollback` comes to while a bundle is on probation; None while none is."""
        live = self._rollouts[name]
        trial, old = live.canary, live.state
        # After a start, until it is there again, what ran before is what is loaded.
        steady = self._serving.find_task(name) if trial is None else trial.incumbent
        if old is None or old.phase != "probation" or steady is None:
            return None
        new, to = self._operator_rollback_state(old, now), history.bundle_ref(steady.bundle)
        left = f"{old.desired.bundle} {old.desired.version}"
        summary = f"{name} went from {left}, which was on probation, to {to}."
        data = {"from": old.desired.digest, "to": to.digest}

        held: list[HoldOff | None] = []

        def write(tx: Transaction) -> None:
            held.append(self._write_step(tx, name, live, old, new, None, now))

        def then() -> None:
            self._apply_in_memory(live, old, new, None, now)
            self._remember_hold_off(live, new, held[-1])

        return Effect(summary, data, write, then)

    def record_operator_rollback(self, tx: Transaction, name: str, now: ClockReading) -> None:
        """In the commit of an operator's `rollback` from the bundle of a roll-out that had settled."""
        live = self._rollouts[name]
        old = live.state
        if old is not None and old.phase == "settled" and self._serving.find_running_digest(live) == old.desired.digest:
            new = self._operator_rollback_state(old, now)
            held = transitions.record(tx, self._author, name, old, new, now)
            # Should the commit fail, it is found in the store with the next start; until then nothing is tried.
            live.state = new
            self._remember_hold_off(live, new, held)

    def stop(self, now: ClockReading) -> None:
        """The daemon stops: tell what was compared, and end what runs apart."""
        for live in self._rollouts.values():
            live.supply.cancel()
            self._serving.stop_run(live, now, final=False)

    def abort(self) -> None:
        """End what runs apart, and write nothing."""
        for live in self._rollouts.values():
            live.supply.cancel()
            for task in (live.canary.candidate if live.canary else None, self._serving.find_task(live.name)):
                if task is not None:
                    self._serving.factory.stop(task)

    # --- one task ---

    def _advance(self, name: str, now: ClockReading) -> bool:
        live, wrote = self._rollouts[name], False
        if now.boot_s < live.retry_at_s:
            return False
        try:
            # First what was compared, so that what is decided goes by all of it.
            wrote = live.canary is not None and live.canary.tick(self._store, self._author, now)
            for _ in range(_MAX_STEPS_PER_TICK):
                facts = self._fact_collector.collect(live, now)
                # What was compared last may speak against it, and nobody looks again once it settled.
                if facts.completion is not None and self._flush_comparison(live, now):
                    wrote = True
                    continue
                new = decide_next_state(live.state, facts)
                if new is live.state or new is None or not self._commit_step(name, live, new, now):
                    break
                wrote = True
            self._serving.reconcile(live, now)
        except (StorageFull, StorageBusy) as problem:
            live.retry_at_s = now.boot_s + _STORE_FULL_RETRY_S
            log.error("task %s: %s; its roll-out goes on when there is room", name, problem)
        except StorageError:
            raise
        except Exception as error:
            # Nobody foresaw it; a roll-out must not take the daemon and the other tasks down.
            live.retry_at_s = now.boot_s + _ERROR_BACKOFF_S
            log.error("task %s: its roll-out rests for %g s: %s", name, _ERROR_BACKOFF_S, error, exc_info=error)
        return wrote

    def _flush_comparison(self, rollout: TaskRollout, now: ClockReading) -> bool:
        return rollout.canary is not None and rollout.canary.flush(self._store, self._author, now)

    def _commit_step(self, name: str, rollout: TaskRollout, new: RolloutState, now: ClockReading) -> bool:
        """Commit one step; False where it cannot be taken after all."""
        old = rollout.state
        try:
            made = self._load_next_task(name, rollout, old, new)
        except (BadBundle, ConfigError) as problem:
            rollout.load_failure = BundleAssessment(
                "unfit", f"it proved itself, and then could not be loaded: {problem}"
            )
            return True
        if new.phase == "probation" and (old is None or old.phase != "probation"):
            past = self._store.load_state(name, task_keys.BUNDLE_HISTORY)
            new = replace(new, previous_history=past.decode() if past else "")
        vital = new.phase in ("refused", "rolled back", "withdrawn")
        try:
            with self._store.exclusive():
                with self._store.transaction(vital=vital) as tx:
                    held = self._write_step(tx, name, rollout, old, new, made, now)
                self._apply_in_memory(rollout, old, new, made, now)
        except BaseException:
            if made is not None and (rollout.canary is None or rollout.canary.candidate is not made):
                self._serving.factory.stop(made)
            raise
        self._remember_hold_off(rollout, new, held)
        log.info("%s", transitions.summarize(name, new))
        return True

    def _load_next_task(
        self, name: str, rollout: TaskRollout, old: RolloutState | None, new: RolloutState
    ) -> LoadedTask | None:
        """The task that answers after this step, where that is another one that has to be loaded first."""
        was = old.phase if old else ""
        if new.phase == "probation" and was != "probation":
            if rollout.canary is not None:
                return rollout.canary.candidate
            assert rollout.proven is not None
            return self._serving.factory.start_subprocess(name, rollout.proven, new.desired.rules)
        stays = new.phase == "settled" and was == "probation" and rollout.canary is not None
        # What ran before has proved itself again, for a bundle that ran for good and was called back.
        returns = (new.phase, new.reason) == ("withdrawn", "aborted") and was not in ("fetching", "shadow", "probation")
        if (stays or returns) and rollout.proven is not None:
            return self._serving.factory.load_in_process(name, rollout.proven)
        return None

    def _write_step(
        self,
        tx: Transaction,
        name: str,
        rollout: TaskRollout,
        old: RolloutState | None,
        new: RolloutState,
        loaded_task: LoadedTask | None,
        now: ClockReading,
    ) -> HoldOff | None:
        held = transitions.record(tx, self._author, name, old, new, now)
        was, past = (old.phase if old else ""), history.load_history(self._store, name)
        if new.phase == "probation" and was != "probation":
            assert loaded_task is not None
            transitions.begin_canary(tx, self._author, name, loaded_task.bundle, past, now)
        elif new.phase == "settled" and was == "probation":
            transitions.promote_canary(tx, self._author, name, new, rollout.configured_digest, now)
        elif was == "probation" and new.phase != "probation" and old is not None:
            self._end_canary(tx, name, rollout, old, new, now)
        elif loaded_task is not None:
            transitions.revert_to_previous(
                tx, self._author, name, loaded_task.bundle, past, rollout.configured_digest, now
            )
        return held

    def _end_canary(
        self, tx: Transaction, name: str, rollout: TaskRollout, old: RolloutState, new: RolloutState, now: ClockReading
    ) -> None:
        trial = rollout.canary
        # Where it did not even start again, what is loaded already is what ran before.
        steady = self._serving.find_task(name) if trial is None else trial.incumbent
        transitions.end_canary(tx, self._author, name, old, steady.bundle if steady else None, new.phase, now)
        if (
            trial is not None
            and steady is not None
            and steady.drift_monitor is not None
            and steady.drift_state is not None
        ):
            on = saved_drift.continue_alert_numbers(steady.drift_state, trial.candidate.drift_state)
            drift_state.save(tx, name, steady.drift_monitor, on, None)

    def _apply_in_memory(
        self,
        rollout: TaskRollout,
        old: RolloutState | None,
        new: RolloutState,
        loaded_task: LoadedTask | None,
        now: ClockReading,
    ) -> None:
        """The memory follows what was committed."""
        was = old.phase if old else ""
        rollout.state, rollout.load_failure = new, None
        if new.phase == "probation" and was != "probation":
            assert loaded_task is not None
            self._serving.start_canary(rollout, loaded_task, now)
        elif was == "probation" and new.phase != "probation":
            self._serving.finish_canary(rollout, loaded_task if new.phase == "settled" else None, now)
        elif loaded_task is not None:
            self._serving.replace_task(rollout.name, loaded_task)
        elif new.phase not in ("shadow", "probation"):
            self._serving.stop_run(rollout, now)
        if new.phase not in ("fetching", "shadow", "probation"):
            history.prune(self._store, self._conf.tasks, self._conf.data_dir)

    # --- what there is ---

    def _operator_rollback_state(self, old: RolloutState, now: ClockReading) -> RolloutState:
        why = "an operator rolled it back"
        at = {"since": clock.to_rfc3339(now.wall_us), "since_s": self._fact_collector.uptime_s(now)}
        return replace(
            old, phase="rolled back", reason="operator", detail=why, numbers={}, late=False, previous_history="", **at
        )

    @staticmethod
    def _remember_hold_off(rollout: TaskRollout, new: RolloutState, hold_off: HoldOff | None) -> None:
        if hold_off is not None:
            rollout.hold_offs[new.desired.digest] = hold_off

    @staticmethod
    def _is_in_progress(rollout: TaskRollout) -> bool:
        return _phase(rollout) in ("fetching", "shadow", "probation", "refused")


def _phase(rollout: TaskRollout) -> str:
    return "" if rollout.state is None else rollout.state.phase
