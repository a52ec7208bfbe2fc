"""What each command about tasks does: run, pause, resume, report, set-schedule, rollback, learn, label and so on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from agent.clock import Now
from agent.config import Config, parse_duration
from agent.device.bundles import history, overrides, quarantine
from agent.device.bundles.planning import planned
from agent.device.commands.executor import Action, Deed
from agent.device.intake import labels
from agent.device.machine import schedule
from agent.device.pipeline import label_metrics, relearn
from agent.device.pipeline.batch import Task
from agent.device.pipeline.tasks import Machine, Planned
from agent.device.rollout.executor import Rollouts
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import BadBundle, ConfigError, Rejected
from agent.toml_files import suggestion
from agent.wire.commands import DEFAULT_SCHEDULE


class TaskActions:
    """`load` verifies, probes and loads the bundle at a path for a task; `status` is what `outstation status` says."""

    def __init__(
        self,
        file: str,
        conf: Config,
        store: Store,
        author: Author,
        machine: Machine,
        load: Callable[[str, Path], Task],
        status: Callable[[], dict[str, Any]],
        rollouts: Rollouts,
    ) -> None:
        self._file, self._conf, self._store, self._author = file, conf, store, author
        self._machine, self._load, self._status, self._rollouts = machine, load, status, rollouts

    def by_name(self) -> dict[str, Action]:
        return {
            "run": self.run,
            "pause": self.pause,
            "resume": self.resume,
            "report": self.report,
            "set-schedule": self.set_schedule,
            "rollback": self.rollback,
            "learn": self.learn,
            "reset-reference": self.reset_reference,
            "label": self.label,
        }

    def run(self, args: Mapping[str, str], now: Now) -> Deed:
        planned = self._planned(args["task"])
        name, stream = planned.task.name, planned.task.config.stream
        if planned.paused:
            raise Rejected(f"{name} is paused; resume it first")
        before = self._store.cursor(name) or self._store.first_row(stream) - 1
        self._machine.run(planned, now)
        after = self._store.cursor(name) or before
        waiting = self._store.last_row(stream) - after
        data = {"used": after - before, "waiting": waiting}
        return Deed(f"{name} ran: {after - before} rows used, {waiting} wait.", data)

    def pause(self, args: Mapping[str, str], now: Now) -> Deed:
        name = self._known(args["task"])

        def write(tx: Transaction) -> None:
            tx.keep(name, overrides.PAUSED, b"1")

        return Deed(f"{name} is paused; its readings are kept.", {}, write, lambda: self._set_paused(name, True))

    def resume(self, args: Mapping[str, str], now: Now) -> Deed:
        name = self._known(args["task"])

        def write(tx: Transaction) -> None:
            tx.drop(name, overrides.PAUSED)

        return Deed(f"{name} runs again when it is due.", {}, write, lambda: self._set_paused(name, False))

    def report(self, args: Mapping[str, str], now: Now) -> Deed:
        self._machine.report()
        return Deed("Health was reported.", self._status())

    def set_schedule(self, args: Mapping[str, str], now: Now) -> Deed:
        name, text = self._known(args["task"]), args["schedule"]
        configured = self._conf.tasks[name].schedule
        wanted = configured if text == DEFAULT_SCHEDULE else text
        try:
            new = schedule.parse(self._file, name, wanted)
        except ConfigError as error:
            raise Rejected(error.problem) from None

        def write(tx: Transaction) -> None:
            if text == DEFAULT_SCHEDULE:
                tx.drop(name, overrides.SCHEDULE)
            else:
                tx.keep(name, overrides.SCHEDULE, wanted.encode())

        def then() -> None:
            planned = self._machine.find(name)
            if planned is not None:
                planned.schedule = new

        return Deed(f"{name} runs {wanted!r} from now on.", {"schedule": wanted, "configured": configured}, write, then)

    def rollback(self, args: Mapping[str, str], now: Now) -> Deed:
        name = self._known(args["task"])
        if (deed := self._rollouts.taken_back(name, now)) is not None:
            return deed
        past = history.history(self._store, name)
        running = self._machine.find(name)
        target = None if past is None else (past.before if running is not None else past.now)
        if past is None or target is None:
            raise Rejected(f"{name} has run no other bundle here before; there is nothing to go back to")
        try:
            task = self._load(name, history.folder(self._conf.data_dir, target.digest))
        except (BadBundle, ConfigError) as problem:
            raise Rejected(f"{target} does not run here, the one that ran goes on: {problem}") from None
        configured = history.configured_digest(self._conf.tasks[name].bundle, self._conf.data_dir)
        was_aside = target.digest in overrides.set_aside(self._store, name)

        def write(tx: Transaction) -> None:
            if was_aside:
                quarantine.end(tx, self._author, name, now)
            self._rollouts.left(tx, name, now)
            overrides.keep_rollback(tx, name, history.rolled_back(target, configured))
            history.record(tx, self._author, name, task.bundle, past, "rollback", now)

        summary = f"{name} went from {past.now} to {target}." if running else f"{name} runs again, with {target}."
        data = {"from": past.now.digest, "to": target.digest}
        return Deed(summary, data, write, lambda: self._exchange(task))

    def learn(self, args: Mapping[str, str], now: Now) -> Deed:
        text = args.get("for", "0 s")
        try:
            for_s = float(parse_duration(text))
        except ValueError as error:
            raise Rejected(f"for: {error}") from None
        return self._reference(args["task"], relearn.made("learn", for_s, "from the fleet"))

    def reset_reference(self, args: Mapping[str, str], now: Now) -> Deed:
        return self._reference(args["task"], relearn.made("reset", 0.0, "from the fleet"))

    def _reference(self, task: str, request: relearn.Request) -> Deed:
        judge = self._planned(task).task.judge
        if judge is None:
            raise Rejected(f"the bundle of {task} has no drift reference, so drift is not watched")

        def write(tx: Transaction) -> None:
            tx.keep(task, relearn.REQUEST, request.to_json())

        least = f"{judge.learn} drift windows" + (f" and {request.for_s:.0f} s" if request.for_s else "")
        return Deed(f"{task} learns its site's reference anew from at least {least} when it next runs.", {}, write)

    def label(self, args: Mapping[str, str], now: Now) -> Deed:
        task = self._planned(args["task"]).task
        try:
            columns = msgspec.json.decode(args["labels"].encode(), type=dict[str, list[Any]])
        except msgspec.MsgspecError as error:
            raise Rejected(f'labels: {error}; they are columns, as {{"row":[100],"label":["PEN"]}}') from None
        lot = labels.lot(task.name, columns)
        with self._store.transaction() as tx:
            refused = labels.take_lot(tx, label_metrics.asked([task])[task.name], lot, now)
        accepted = len(lot.labels) + len(lot.bad) - len(refused)
        summary = f"{accepted} labels of {task.name} accepted, {len(refused)} rejected."
        return Deed(summary, {"accepted": accepted, "rejected": {str(k): refused[k] for k in sorted(refused)}})

    def _exchange(self, task: Task) -> None:
        self._machine.exchange(task, lambda new: planned(self._file, self._conf, self._store, new))

    def _set_paused(self, name: str, paused: bool) -> None:
        planned = self._machine.find(name)
        if planned is not None:
            planned.paused = paused

    def _known(self, name: str) -> str:
        if name not in self._conf.tasks:
            raise Rejected(f"there is no task {name!r}{suggestion(name, self._conf.tasks)}")
        return name

    def _planned(self, name: str) -> Planned:
        planned = self._machine.find(self._known(name))
        if planned is None:
            raise Rejected(f"{name} does not run: its bundle was refused at the start, see the alerts; or roll it back")
        return planned
