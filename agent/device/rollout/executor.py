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
from agent.clock import Now
from agent.config import Config
from agent.device.bundles import history
from agent.device.bundles import rollout_state as standings
from agent.device.bundles.rollout_state import Held, Standing
from agent.device.commands.executor import Deed
from agent.device.pipeline import drift_state
from agent.device.pipeline.batch import Task
from agent.device.rollout import saved_drift, transitions
from agent.device.rollout.desired_state import Desires
from agent.device.rollout.facts import Outlook
from agent.device.rollout.serving import Live, Serving
from agent.device.rollout.state_machine import Finding, decide
from agent.device.rollout.supply import Supply
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import BadBundle, ConfigError, ModelDied, StorageBusy, StorageError, StorageFull

log = logging.getLogger("outstation.updates")

_EVERY_S, _FULL_S, _REST_S = 1.0, 10.0, 60.0
# Two are the most that a change of mind takes; the rest is for safety.
_MOST_STEPS = 6


class Rollouts:
    """Of one device. Used by the main loop."""

    def __init__(
        self,
        conf: Config,
        store: Store,
        author: Author,
        desires: Desires,
        serving: Serving,
        supplies: Mapping[str, Supply],
    ) -> None:
        self._conf, self._store, self._author, self._serving = conf, store, author, serving
        self._outlook = Outlook(conf, store, author.device, desires, serving)
        self._live = {
            name: Live(
                name,
                supplies[name],
                standings.standing(store, name),
                standings.held(store, name),
                history.configured_digest(task.bundle, conf.data_dir),
            )
            for name, task in conf.tasks.items()
        }
        self._at_s = 0.0
        self.stirred = False

    # --- on the main loop ---

    def turn(self, now: Now) -> bool:
        """Go on with every roll-out; whether anything was written."""
        if now.boot_s < self._at_s and not self.stirred:
            return False
        self.stirred, self._at_s = False, now.boot_s + _EVERY_S
        wrote = [self._go_on(name, now) for name in self._live]
        return any(wrote)

    def wait_s(self, now: Now) -> float:
        """Until `turn` may have something to do."""
        return (
            max(0.0, self._at_s - now.boot_s) if any(self._is_under_way(one) for one in self._live.values()) else 60.0
        )

    def resumes(self, name: str) -> bool:
        """Whether the bundle that answers for this task is on its way into memory, after a start: the task waits."""
        live = self._live.get(name)
        return live is not None and _phase(live) == "probation" and live.trial is None

    def ran(self, name: str, now: Now) -> None:
        """A batch of the task was committed."""
        if self._live[name].trial is not None:
            self._go_on(name, now)

    def fell(self, name: str, died: ModelDied, now: Now) -> Task | None:
        """The bundle on probation gave no answers to a batch: who answers it instead, None where nobody can."""
        live = self._live[name]
        trial = live.trial
        if trial is None or not trial.serves:
            return None
        trial.failed(died)
        log.error("task %s: the bundle on probation: %s", name, died)
        self._go_on(name, now)
        if live.trial is None:
            return self._serving.task(name)
        # It may fail now and then: the one before answers for once, and learns nothing from what it sees in between.
        return None if trial.steady is None else changed(trial.steady, judge=None, drift=None, trying=trial)

    def taken_back(self, name: str, now: Now) -> Deed | None:
        """What an operator's `rollback` comes to while a bundle is on probation; None while none is."""
        live = self._live[name]
        trial, old = live.trial, live.standing
        # After a start, until it is there again, what ran before is what is loaded.
        steady = self._serving.task(name) if trial is None else trial.steady
        if old is None or old.phase != "probation" or steady is None:
            return None
        new, to = self._by_operator(old, now), history.ran(steady.bundle)
        left = f"{old.wanted.bundle} {old.wanted.version}"
        summary = f"{name} went from {left}, which was on probation, to {to}."
        data = {"from": old.wanted.digest, "to": to.digest}

        held: list[Held | None] = []

        def write(tx: Transaction) -> None:
            held.append(self._write(tx, name, live, old, new, None, now))

        def then() -> None:
            self._after(live, old, new, None, now)
            self._note_held(live, new, held[-1])

        return Deed(summary, data, write, then)

    def left(self, tx: Transaction, name: str, now: Now) -> None:
        """In the commit of an operator's `rollback` from the bundle of a roll-out that had settled."""
        live = self._live[name]
        old = live.standing
        if old is not None and old.phase == "settled" and self._serving.runs(live) == old.wanted.digest:
            new = self._by_operator(old, now)
            held = transitions.write(tx, self._author, name, old, new, now)
            # Should the commit fail, it is found in the store with the next start; until then nothing is tried.
            live.standing = new
            self._note_held(live, new, held)

    def stop(self, now: Now) -> None:
        """The daemon stops: tell what was compared, and end what runs apart."""
        for live in self._live.values():
            live.supply.drop()
            self._serving.end(live, now, over=False)

    def drop(self) -> None:
        """End what runs apart, and write nothing."""
        for live in self._live.values():
            live.supply.drop()
            for task in (live.trial.candidate if live.trial else None, self._serving.task(live.name)):
                if task is not None:
                    self._serving.makes.end(task)

    # --- one task ---

    def _go_on(self, name: str, now: Now) -> bool:
        live, wrote = self._live[name], False
        if now.boot_s < live.rests_until_s:
            return False
        try:
            # First what was compared, so that what is decided goes by all of it.
            wrote = live.trial is not None and live.trial.turn(self._store, self._author, now)
            for _ in range(_MOST_STEPS):
                facts = self._outlook.facts(live, now)
                # What was compared last may speak against it, and nobody looks again once it settled.
                if facts.enough is not None and self._told_more(live, now):
                    wrote = True
                    continue
                new = decide(live.standing, facts)
                if new is live.standing or new is None or not self._step(name, live, new, now):
                    break
                wrote = True
            self._serving.keep_up(live, now)
        except (StorageFull, StorageBusy) as problem:
            live.rests_until_s = now.boot_s + _FULL_S
            log.error("task %s: %s; its roll-out goes on when there is room", name, problem)
        except StorageError:
            raise
        except Exception as error:
            # Nobody foresaw it; a roll-out must not take the daemon and the other tasks down.
            live.rests_until_s = now.boot_s + _REST_S
            log.error("task %s: its roll-out rests for %g s: %s", name, _REST_S, error, exc_info=error)
        return wrote

    def _told_more(self, live: Live, now: Now) -> bool:
        return live.trial is not None and live.trial.conclude(self._store, self._author, now)

    def _step(self, name: str, live: Live, new: Standing, now: Now) -> bool:
        """Commit one step; False where it cannot be taken after all."""
        old = live.standing
        try:
            made = self._made(name, live, old, new)
        except (BadBundle, ConfigError) as problem:
            live.unfit = Finding("unfit", f"it proved itself, and then could not be loaded: {problem}")
            return True
        if new.phase == "probation" and (old is None or old.phase != "probation"):
            past = self._store.state(name, history.ACTIVE)
            new = replace(new, past=past.decode() if past else "")
        vital = new.phase in ("refused", "rolled back", "withdrawn")
        try:
            with self._store.alone():
                with self._store.transaction(vital=vital) as tx:
                    held = self._write(tx, name, live, old, new, made, now)
                self._after(live, old, new, made, now)
        except BaseException:
            if made is not None and (live.trial is None or live.trial.candidate is not made):
                self._serving.makes.end(made)
            raise
        self._note_held(live, new, held)
        log.info("%s", transitions.sentence(name, new))
        return True

    def _made(self, name: str, live: Live, old: Standing | None, new: Standing) -> Task | None:
        """The task that answers after this step, where that is another one that has to be loaded first."""
        was = old.phase if old else ""
        if new.phase == "probation" and was != "probation":
            if live.trial is not None:
                return live.trial.candidate
            assert live.proof is not None
            return self._serving.makes.apart(name, live.proof, new.wanted.rules)
        stays = new.phase == "settled" and was == "probation" and live.trial is not None
        # What ran before has proved itself again, for a bundle that ran for good and was called back.
        returns = (new.phase, new.reason) == ("withdrawn", "aborted") and was not in ("fetching", "shadow", "probation")
        if (stays or returns) and live.proof is not None:
            return self._serving.makes.here(name, live.proof)
        return None

    def _write(
        self, tx: Transaction, name: str, live: Live, old: Standing | None, new: Standing, made: Task | None, now: Now
    ) -> Held | None:
        held = transitions.write(tx, self._author, name, old, new, now)
        was, past = (old.phase if old else ""), history.history(self._store, name)
        if new.phase == "probation" and was != "probation":
            assert made is not None
            transitions.begin_probation(tx, self._author, name, made.bundle, past, now)
        elif new.phase == "settled" and was == "probation":
            transitions.settle(tx, self._author, name, new, live.configured, now)
        elif was == "probation" and new.phase != "probation" and old is not None:
            self._end_probation(tx, name, live, old, new, now)
        elif made is not None:
            transitions.go_back(tx, self._author, name, made.bundle, past, live.configured, now)
        return held

    def _end_probation(self, tx: Transaction, name: str, live: Live, old: Standing, new: Standing, now: Now) -> None:
        trial = live.trial
        # Where it did not even start again, what is loaded already is what ran before.
        steady = self._serving.task(name) if trial is None else trial.steady
        transitions.end_probation(tx, self._author, name, old, steady.bundle if steady else None, new.phase, now)
        if trial is not None and steady is not None and steady.judge is not None and steady.drift is not None:
            on = saved_drift.numbered_on(steady.drift, trial.candidate.drift)
            drift_state.keep(tx, name, steady.judge, on, None)

    def _after(self, live: Live, old: Standing | None, new: Standing, made: Task | None, now: Now) -> None:
        """The memory follows what was committed."""
        was = old.phase if old else ""
        live.standing, live.unfit = new, None
        if new.phase == "probation" and was != "probation":
            assert made is not None
            self._serving.begin(live, made, now)
        elif was == "probation" and new.phase != "probation":
            self._serving.stand_in(live, made if new.phase == "settled" else None, now)
        elif made is not None:
            self._serving.exchange(live.name, made)
        elif new.phase not in ("shadow", "probation"):
            self._serving.end(live, now)
        if new.phase not in ("fetching", "shadow", "probation"):
            history.prune(self._store, self._conf.tasks, self._conf.data_dir)

    # --- what there is ---

    def _by_operator(self, old: Standing, now: Now) -> Standing:
        why = "an operator rolled it back"
        at = {"since": clock.rfc3339(now.wall_us), "since_s": self._outlook.uptime_s(now)}
        return replace(old, phase="rolled back", reason="operator", why=why, numbers={}, late=False, past="", **at)

    @staticmethod
    def _note_held(live: Live, new: Standing, held: Held | None) -> None:
        if held is not None:
            live.held[new.wanted.digest] = held

    @staticmethod
    def _is_under_way(live: Live) -> bool:
        return _phase(live) in ("fetching", "shadow", "probation", "refused")


def _phase(live: Live) -> str:
    return "" if live.standing is None else live.standing.phase
