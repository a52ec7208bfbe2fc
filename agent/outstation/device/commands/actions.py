"""Actions: the remote commands about tasks, such as run, pause, set-schedule, rollback, relearn, label and sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from outstation.device.bundles import history, overrides, quarantine
from outstation.device.commands.executor import Action
from outstation.device.config import Config, parse_duration
from outstation.device.config.tasks import NO_TASK
from outstation.device.intake import label_intake
from outstation.device.machine import schedule_text
from outstation.device.pipeline import labelled_output, relearn
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.pipeline.relearn import RelearnRequest
from outstation.device.pipeline.tasks import Effect, Runtime, ScheduledTask, make_scheduled_task
from outstation.device.rollout.executor import RolloutExecutor
from outstation.device.samples import requests
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import decoders
from outstation.foundation.clock import ClockReading
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import BadBundle, ConfigError, RowRejected
from outstation.foundation.names import is_name
from outstation.protocol.wire.commands import DEFAULT_SCHEDULE


class TaskActions:
    """Actions on tasks.

    `load` verifies, probes and loads the bundle at a path; `status` returns the part of the status document that may
    leave the device.
    """

    def __init__(
        self,
        file: str,
        conf: Config,
        store: Store,
        message_log: MessageLog,
        runtime: Runtime,
        load: Callable[[str, Path], LoadedTask],
        status: Callable[[], dict[str, Any]],
        rollouts: RolloutExecutor,
    ) -> None:
        self._file, self._conf, self._store, self._message_log = file, conf, store, message_log
        self._runtime, self._load, self._status, self._rollouts = runtime, load, status, rollouts

    def by_name(self) -> dict[str, Action]:
        return {
            "run": self.run,
            "pause": self.pause,
            "resume": self.resume,
            "report": self.report,
            "set-schedule": self.set_schedule,
            "rollback": self.rollback,
            "relearn": self.relearn,
            "reset-reference": self.reset_reference,
            "accept-reference": self.accept_reference,
            "label": self.label,
            "sample": self.sample,
        }

    def run(self, args: Mapping[str, str], now: ClockReading) -> Effect:
        scheduled = self._require_scheduled(args["task"])
        name, stream = scheduled.task.name, scheduled.task.config.stream
        if scheduled.paused:
            raise RowRejected(f"{name} is paused; resume it first")
        before = self._store.cursor(name) or self._store.first_row(stream) - 1
        self._runtime.run(scheduled, now)
        after = self._store.cursor(name) or before
        waiting = self._store.last_row(stream) - after
        data = {"used": after - before, "waiting": waiting}
        return Effect(f"{name} ran: {after - before} rows used, {waiting} wait.", data)

    def pause(self, args: Mapping[str, str], now: ClockReading) -> Effect:
        name = self._require_known(args["task"])

        def write(tx: Transaction) -> None:
            tx.save_state(name, task_keys.PAUSED, b"1")

        return Effect(f"{name} is paused; its readings are kept.", {}, write, lambda: self._set_paused(name, True))

    def resume(self, args: Mapping[str, str], now: ClockReading) -> Effect:
        name = self._require_known(args["task"])

        def write(tx: Transaction) -> None:
            tx.delete_state(name, task_keys.PAUSED)

        return Effect(f"{name} runs again when it is due.", {}, write, lambda: self._set_paused(name, False))

    def report(self, args: Mapping[str, str], now: ClockReading) -> Effect:
        self._runtime.report()
        return Effect("Health was reported.", self._status())

    def set_schedule(self, args: Mapping[str, str], now: ClockReading) -> Effect:
        name, text = self._require_known(args["task"]), args["schedule"]
        configured = self._conf.tasks[name].schedule
        wanted = configured if text == DEFAULT_SCHEDULE else text
        try:
            new = schedule_text.parse(self._file, name, wanted, device=self._conf.device.id)
        except ConfigError as error:
            raise RowRejected(error.problem) from None

        def write(tx: Transaction) -> None:
            if text == DEFAULT_SCHEDULE:
                tx.delete_state(name, task_keys.SCHEDULE_OVERRIDE)
            else:
                tx.save_state(name, task_keys.SCHEDULE_OVERRIDE, wanted.encode())

        def then() -> None:
            scheduled = self._runtime.find(name)
            if scheduled is not None:
                scheduled.schedule = new

        return Effect(
            f"{name} runs {wanted!r} from now on.", {"schedule": wanted, "configured": configured}, write, then
        )

    def rollback(self, args: Mapping[str, str], now: ClockReading) -> Effect:
        name = self._require_known(args["task"])
        if (effect := self._rollouts.plan_rollback(name, now)) is not None:
            return effect
        past = history.load_history(self._store, name)
        is_running = self._runtime.find(name) is not None
        target = None if past is None else (past.previous if is_running else past.current)
        if past is None or target is None:
            raise RowRejected(f"{name} has run no other bundle here before; there is nothing to go back to")
        try:
            task = self._load(name, history.copy_folder(self._conf.data_dir, target.digest))
        except (BadBundle, ConfigError) as problem:
            raise RowRejected(f"{target} does not run here, {past.current} goes on: {problem}") from None
        configured = history.configured_digest(self._conf.tasks[name].bundle, self._conf.data_dir)
        was_quarantined = target.digest in overrides.load_quarantined(self._store, name)

        def write(tx: Transaction) -> None:
            if was_quarantined:
                quarantine.release(tx, self._message_log, name, now)
            self._rollouts.record_operator_rollback(tx, name, now)
            overrides.save_bundle_override(tx, name, history.make_override(target, configured))
            history.record_activation(tx, self._message_log, name, task.bundle, past, "rollback", now)

        summary = (
            f"{name} went from {past.current} to {target}." if is_running else f"{name} runs again, with {target}."
        )
        data = {"from": past.current.digest, "to": target.digest}

        def then() -> None:
            self._runtime.replace_task(task, lambda new: make_scheduled_task(self._file, self._conf, self._store, new))

        return Effect(summary, data, write, then)

    def relearn(self, args: Mapping[str, str], now: ClockReading) -> Effect:
        text = args.get("for", "0 s")
        try:
            for_s = float(parse_duration(text))
        except ValueError as error:
            raise RowRejected(f"for: {error}") from None
        return self._request_relearn(args["task"], relearn.make_request("relearn", for_s, "from the fleet"))

    def reset_reference(self, args: Mapping[str, str], now: ClockReading) -> Effect:
        return self._request_relearn(args["task"], relearn.make_request("reset", 0.0, "from the fleet"))

    def accept_reference(self, args: Mapping[str, str], now: ClockReading) -> Effect:
        return self._request_relearn(args["task"], relearn.make_request("accept", 0.0, "from the fleet"))

    def _request_relearn(self, task: str, request: RelearnRequest) -> Effect:
        drift = self._require_scheduled(task).task.drift
        if drift is None:
            raise RowRejected(f"the bundle of {task} has no drift reference, so drift is not tested")

        def write(tx: Transaction) -> None:
            tx.save_state(task, task_keys.RELEARN_REQUEST, request.to_json())

        if request.action == "accept":
            return Effect(f"{task} accepts its site reference when it next runs.", {}, write)
        span = f" and {request.duration_s:.0f} s" if request.duration_s else ""
        least = drift.monitor.settings.learn_windows
        summary = (
            f"{task} learns its site reference again, from at least {least} drift windows{span}, when it next runs."
        )
        return Effect(summary, {}, write)

    def label(self, args: Mapping[str, str], now: ClockReading) -> Effect:
        task = self._require_scheduled(args["task"]).task
        try:
            columns = decoders.from_json(args["labels"].encode(), dict[str, list[Any]])
        except msgspec.MsgspecError as error:
            raise RowRejected(f'labels: {error}; they are columns, as {{"row":[100],"label":["PEN"]}}') from None
        # The command is signed, so its key vouches for the name.
        by = args.get("by", "fleet")
        if not is_name(by):
            raise RowRejected(f"by: {by[:40]!r} is no name: 1-64 of a-z, 0-9, - and _")
        batch = replace(label_intake.parse_columns(task.name, columns), by=by)
        with self._store.transaction() as tx:
            rejected = label_intake.store_labels(tx, labelled_output.build_label_targets([task])[task.name], batch, now)
        accepted = len(batch.labels) + len(batch.rejected) - len(rejected)
        summary = f"{accepted} labels of {task.name} accepted, {len(rejected)} rejected."
        return Effect(summary, {"accepted": accepted, "rejected": {str(k): rejected[k] for k in sorted(rejected)}})

    def sample(self, args: Mapping[str, str], now: ClockReading) -> Effect:
        task = self._require_scheduled(args["task"]).task
        if task.samples is None or not task.samples.config.on_request:
            raise RowRejected(f"the owner of this device does not consent: no [samples] on_request for {task.name}")
        row = int(args["row"]) if args["row"].isdecimal() and len(args["row"]) < 16 else 0
        if not 0 < row <= (self._store.cursor(task.name) or 0):
            raise RowRejected(f"row {args['row']!r} has no result of {task.name} yet")
        request = task.samples.request("requested", row, self._message_log.least_count(task.name))

        def write(tx: Transaction) -> None:
            requests.add(tx, task.name, [request])

        return Effect(f"Readings around row {row} of {task.name} are sent, if they are stored and fit the budget.",
                      {"rows": [request.first, request.last]}, write)  # fmt: skip

    def _set_paused(self, name: str, paused: bool) -> None:
        scheduled = self._runtime.find(name)
        if scheduled is not None:
            scheduled.paused = paused

    def _require_known(self, name: str) -> str:
        if name not in self._conf.tasks:
            raise RowRejected(f"there is no task {name!r}{did_you_mean(name, self._conf.tasks, NO_TASK)}")
        return name

    def _require_scheduled(self, name: str) -> ScheduledTask:
        scheduled = self._runtime.find(self._require_known(name))
        if scheduled is None:
            raise RowRejected(
                f"{name} does not run: its bundle failed at the start, see the alerts; `rollback` runs the previous one"
            )
        return scheduled
