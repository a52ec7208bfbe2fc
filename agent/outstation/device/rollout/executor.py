"""Roll-out executor: carry out the steps that the state machine decides, on the main loop, one step per commit.

Memory follows the store: after a crash between any two steps, the daemon reads the task's state, has the bundle
verified again, and continues. The active bundle changes between two batches only, in one commit with the message that
reports it. The task's cursor does not depend on the bundle.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from msgspec.structs import replace

from outstation.device.bundles import history, rollout_state
from outstation.device.bundles.rollout_state import HoldOff, RolloutState
from outstation.device.config import Config
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.pipeline.tasks import Effect
from outstation.device.rollout import saved_drift, transitions
from outstation.device.rollout.desired_state import DesiredStateStore
from outstation.device.rollout.facts import FactCollector
from outstation.device.rollout.serving import ServingManager, TaskRollout
from outstation.device.rollout.state_machine import BundleAssessment, decide_next_state
from outstation.device.rollout.supply import BundleSupply
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import (
    BadBundle,
    ConfigError,
    ModelProcessFailed,
    StorageBusy,
    StorageError,
    StorageFull,
)

log = logging.getLogger("outstation.updates")

_POLL_INTERVAL_S, _STORE_FULL_RETRY_S, _ERROR_BACKOFF_S, _IDLE_S = 1.0, 10.0, 60.0, 60.0
# A change of mind takes two steps; the rest is a safety margin.
_MAX_STEPS_PER_TICK = 6


class RolloutExecutor:
    def __init__(
        self,
        conf: Config,
        store: Store,
        message_log: MessageLog,
        desired_state: DesiredStateStore,
        serving: ServingManager,
        supplies: Mapping[str, BundleSupply],
    ) -> None:
        self._conf, self._store, self._message_log, self._serving = conf, store, message_log, serving
        self._fact_collector = FactCollector(conf, store, message_log.device, desired_state, serving)
        self._rollouts = {
            name: TaskRollout(
                name,
                supplies[name],
                rollout_state.load_state(store, name),
                rollout_state.load_hold_offs(store, name),
                history.configured_digest(task.bundle, conf.data_dir),
            )
            for name, task in conf.tasks.items()
        }
        self._next_tick_s = 0.0
        self.wake_requested = False

    # --- on the main loop ---

    def tick(self, now: ClockReading) -> bool:
        """Advance every roll-out; return True if anything was written."""
        if now.boot_s < self._next_tick_s and not self.wake_requested:
            return False
        self.wake_requested, self._next_tick_s = False, now.boot_s + _POLL_INTERVAL_S
        wrote = [self._advance(name, now) for name in self._rollouts]
        return any(wrote)

    def wait_s(self, now: ClockReading) -> float:
        """Return the seconds until `tick` may have work."""
        unfinished = ("downloading", "shadow", "canary", "rejected")
        if any(_phase(rollout) in unfinished for rollout in self._rollouts.values()):
            return max(0.0, self._next_tick_s - now.boot_s)
        return _IDLE_S

    def is_resuming(self, name: str) -> bool:
        """Return True if the task waits, after a start, for its canary to be loaded."""
        rollout = self._rollouts.get(name)
        return rollout is not None and _phase(rollout) == "canary" and rollout.canary is None

    def on_batch_committed(self, name: str, now: ClockReading) -> None:
        """Advance the task's roll-out after a batch."""
        if self._rollouts[name].canary is not None:
            self._advance(name, now)

    def has_canary(self, name: str) -> bool:
        """Return True if a canary answers for the task."""
        canary = self._rollouts[name].canary
        return canary is not None and canary.is_serving

    def on_canary_failure(self, name: str, failure: ModelProcessFailed, now: ClockReading) -> LoadedTask | None:
        """Return the task that answers a batch instead of the failed canary; None if there is none."""
        rollout = self._rollouts[name]
        canary = rollout.canary
        assert canary is not None
        canary.record_failure(failure)
        log.error("task %s: the canary failed: %s", name, failure)
        self._advance(name, now)
        if rollout.canary is None:
            return self._serving.find_task(name)
        if canary.incumbent is None:
            return None
        # Rules may tolerate failures. The previous bundle answers this batch, and learns no drift from a single one.
        substitute = canary.incumbent.without_drift()
        substitute.attach(canary)
        return substitute

    def plan_rollback(self, name: str, now: ClockReading) -> Effect | None:
        """Return the effect of an operator's `rollback` while a canary runs; None if none runs."""
        rollout = self._rollouts[name]
        old, incumbent = rollout.state, self._serving.find_incumbent(rollout)
        if old is None or old.phase != "canary" or incumbent is None:
            return None
        new, target = self._operator_rollback_state(old, now), history.bundle_ref(incumbent.bundle)
        summary = f"{name} rolled back from the canary {old.desired.bundle} {old.desired.version} to {target}."
        hold_offs: list[HoldOff | None] = []

        def write(tx: Transaction) -> None:
            hold_offs.append(self._write_step(tx, rollout, new, None, now))

        def after_commit() -> None:
            self._apply_in_memory(rollout, new, None, now)
            _remember_hold_off(rollout, new, hold_offs[-1])

        return Effect(summary, {"from": old.desired.digest, "to": target.digest}, write, after_commit)

    def record_operator_rollback(self, tx: Transaction, name: str, now: ClockReading) -> None:
        """Record an operator's `rollback` from an active bundle of a roll-out, in the commit of the command."""
        rollout = self._rollouts[name]
        old = rollout.state
        if old is None or old.phase != "active" or self._serving.find_running_digest(rollout) != old.desired.digest:
            return
        new = self._operator_rollback_state(old, now)
        hold_off = transitions.record(tx, self._message_log, name, old, new, now)
        # If the commit fails, the next start reads the old state; until then the bundle is not tried.
        rollout.state = new
        _remember_hold_off(rollout, new, hold_off)

    def stop(self, now: ClockReading) -> None:
        """Report comparisons and end all trials: the daemon stops."""
        for rollout in self._rollouts.values():
            rollout.supply.cancel()
            self._serving.stop_run(rollout, now, final=False)

    def abort(self) -> None:
        """End all model processes and write nothing."""
        for rollout in self._rollouts.values():
            rollout.supply.cancel()
            candidate = rollout.canary.candidate if rollout.canary else None
            for task in (candidate, self._serving.find_task(rollout.name)):
                if task is not None:
                    self._serving.factory.stop(task)

    # --- one task ---

    def _advance(self, name: str, now: ClockReading) -> bool:
        rollout, wrote = self._rollouts[name], False
        if now.boot_s < rollout.retry_at_s:
            return False
        try:
            # Report the comparison first, so that the decision includes all of it.
            wrote = rollout.canary is not None and rollout.canary.tick(self._store, self._message_log, now)
            for _ in range(_MAX_STEPS_PER_TICK):
                facts = self._fact_collector.collect(rollout, now)
                # The last batches may be evidence against the bundle, and rules are not evaluated after promotion.
                canary = rollout.canary if facts.completion is not None else None
                if canary is not None and canary.flush(self._store, self._message_log, now):
                    wrote = True
                    continue
                new = decide_next_state(rollout.state, facts)
                if new is rollout.state or new is None or not self._commit_step(rollout, new, now):
                    break
                wrote = True
            self._serving.reconcile(rollout, now)
        except (StorageFull, StorageBusy) as problem:
            rollout.retry_at_s = now.boot_s + _STORE_FULL_RETRY_S
            log.error("task %s: %s; its roll-out continues when there is room", name, problem)
        except StorageError:
            raise
        except Exception as error:
            # Unforeseen; a roll-out must not take the daemon and the other tasks down.
            rollout.retry_at_s = now.boot_s + _ERROR_BACKOFF_S
            log.error("task %s: its roll-out pauses for %g s: %s", name, _ERROR_BACKOFF_S, error, exc_info=error)
        return wrote

    def _commit_step(self, rollout: TaskRollout, new: RolloutState, now: ClockReading) -> bool:
        """Commit one step and apply it in memory."""
        try:
            loaded = self._load_next_task(rollout, new)
        except (BadBundle, ConfigError) as problem:
            detail = f"it was verified, but cannot be loaded: {problem}"
            rollout.load_failure = BundleAssessment("incompatible", detail)
            return True
        if new.phase == "canary" and _phase(rollout) != "canary":
            past = self._store.load_state(rollout.name, task_keys.BUNDLE_HISTORY)
            new = replace(new, previous_history=past.decode() if past else "")
        is_vital = new.phase in ("rejected", "rolled_back", "cancelled")
        try:
            with self._store.exclusive():
                with self._store.transaction(vital=is_vital) as tx:
                    hold_off = self._write_step(tx, rollout, new, loaded, now)
                self._apply_in_memory(rollout, new, loaded, now)
        except BaseException:
            if loaded is not None and (rollout.canary is None or rollout.canary.candidate is not loaded):
                self._serving.factory.stop(loaded)
            raise
        _remember_hold_off(rollout, new, hold_off)
        log.info("%s", transitions.summarize(rollout.name, new))
        return True

    def _load_next_task(self, rollout: TaskRollout, new: RolloutState) -> LoadedTask | None:
        """Return the task that answers after this step, if it must be loaded first."""
        old_phase, factory = _phase(rollout), self._serving.factory
        if new.phase == "canary" and old_phase != "canary":
            if rollout.canary is not None:
                return rollout.canary.candidate
            assert rollout.proven is not None
            return factory.start(rollout.name, rollout.proven, new.desired.rules)
        is_promotion = new.phase == "active" and old_phase == "canary" and rollout.canary is not None
        # The previous bundle was verified again, to replace an active one that is rolled back.
        is_aborted = (new.phase, new.reason) == ("cancelled", "aborted")
        is_revert = is_aborted and old_phase not in ("downloading", "shadow", "canary")
        if (is_promotion or is_revert) and rollout.proven is not None:
            return factory.start(rollout.name, rollout.proven)
        return None

    def _write_step(
        self, tx: Transaction, rollout: TaskRollout, new: RolloutState, loaded: LoadedTask | None, now: ClockReading
    ) -> HoldOff | None:
        message_log, name, old, configured = self._message_log, rollout.name, rollout.state, rollout.configured_digest
        hold_off = transitions.record(tx, message_log, name, old, new, now)
        old_phase, past = _phase(rollout), history.load_history(self._store, name)
        if new.phase == "canary" and old_phase != "canary":
            assert loaded is not None
            saved_drift.take_over(loaded, self._store)
            transitions.begin_canary(tx, message_log, name, loaded, past, now)
        elif new.phase == "active" and old_phase == "canary":
            transitions.promote_canary(tx, message_log, name, new, configured, now)
        elif old_phase == "canary" and new.phase != "canary" and old is not None:
            incumbent = self._serving.find_incumbent(rollout)
            bundle = incumbent.bundle if incumbent else None
            transitions.end_canary(tx, message_log, name, old, bundle, new.phase, now)
        elif loaded is not None:
            transitions.revert_to_previous(tx, message_log, name, loaded.bundle, past, configured, now)
        return hold_off

    def _apply_in_memory(
        self, rollout: TaskRollout, new: RolloutState, loaded: LoadedTask | None, now: ClockReading
    ) -> None:
        old_phase = _phase(rollout)
        rollout.state, rollout.load_failure = new, None
        if new.phase == "canary" and old_phase != "canary":
            assert loaded is not None
            self._serving.start_canary(rollout, loaded, now)
        elif old_phase == "canary" and new.phase != "canary":
            self._serving.finish_canary(rollout, loaded if new.phase == "active" else None, now)
        elif loaded is not None:
            self._serving.replace_task(rollout.name, loaded)
        elif new.phase not in ("shadow", "canary"):
            self._serving.stop_run(rollout, now)
        if new.phase not in ("downloading", "shadow", "canary"):
            history.prune(self._store, self._conf.tasks, self._conf.data_dir)

    def _operator_rollback_state(self, old: RolloutState, now: ClockReading) -> RolloutState:
        since, uptime_s = clock.to_rfc3339(now.wall_us), self._store.uptime_s(now)
        return transitions.make_rolled_back(old, "operator", "an operator rolled it back", since, uptime_s)


def _remember_hold_off(rollout: TaskRollout, new: RolloutState, hold_off: HoldOff | None) -> None:
    if hold_off is not None:
        rollout.hold_offs[new.desired.digest] = hold_off


def _phase(rollout: TaskRollout) -> str:
    return "" if rollout.state is None else rollout.state.phase
