"""Health reporting: health messages, audit events of the daemon, and alerts about bundles that do not run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from outstation import __version__
from outstation.device.batch_parts import deadline
from outstation.device.bundles import overrides, rollout_state
from outstation.device.capacity import space
from outstation.device.config import Config
from outstation.device.machine import timekeeping
from outstation.device.machine.timekeeping import SYNCED
from outstation.device.samples import budget
from outstation.device.store import retention, task_keys
from outstation.device.store.cost import ProcessMeter
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.device.uplink import meter
from outstation.device.usage import save_usage
from outstation.foundation import decoders
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageFull
from outstation.protocol.alerts.kinds import BUNDLE_FAILED
from outstation.protocol.wire import jws
from outstation.protocol.wire.messages import AcknowledgementRef, AckPayload

log = logging.getLogger("outstation")

_INTERVAL_S, _METERED_INTERVAL_S = 60.0, 3600.0
# A quotation has 222 bytes: 5 kB a day.
_QUOTE_INTERVAL_S = 3600.0
# A statement of usage has 150 bytes.
_USAGE_INTERVAL_S = 3600.0

ModelsByTask = Mapping[str, Mapping[str, Any]]


class BundleFailure(msgspec.Struct, frozen=True):
    """A task whose bundle does not run here; `fallback` names the bundle that runs instead, if one does."""

    task: str
    bundle: str
    reason: str
    fallback: str = ""


class HealthReporter:
    """Writes the messages; one that finds no room is dropped, as the next one reports the same."""

    def __init__(
        self,
        conf: Config,
        store: Store,
        message_log: MessageLog,
        models: Mapping[str, Mapping[str, Any]],
        now: Callable[[], ClockReading],
    ) -> None:
        self._conf, self._store, self._message_log, self._models, self._now = conf, store, message_log, models, now
        self._process_meter = ProcessMeter()
        self._next_quote_s = self._next_usage_s = float("-inf")
        # Further members of a health message.
        self.extra_members: Callable[[ClockReading], Mapping[str, Any]] = lambda now: {}

    def write_health(self) -> None:
        now = self._now()

        def write(tx: Transaction) -> None:
            if now.quality == "synced":
                tx.set_meta(SYNCED, str(now.wall_us))
            self._process_meter.tick(tx, now)
            spent = save_usage(tx, self._conf, self._store)
            body = build_body(self._conf, self._store, self._models)
            if now.boot_s >= self._next_quote_s and (quoted := quote_acknowledgement(self._store)) is not None:
                self._next_quote_s = now.boot_s + _QUOTE_INTERVAL_S
                body["acknowledged"] = quoted
            if now.boot_s >= self._next_usage_s and spent.seconds >= 1:
                self._next_usage_s = now.boot_s + _USAGE_INTERVAL_S
                body["usage"] = spent
            if (metered := self._conf.broker.metered) is not None:
                body["metered"] = meter.build_status(metered, self._store, now)
            body |= budget.to_status(self._store, self._conf.samples, now)
            members = {**body, **self.extra_members(now), "wall_clock": timekeeping.build_report(self._store, now)}
            self._message_log.append(tx, "health", None, members, now)

        self._run_in_transaction(write)

    def write_event(self, name: str, summary: str) -> None:
        body = {"event": name, "summary": summary, "evidence": {"tasks": self._models}}
        self._run_in_transaction(lambda tx: self._message_log.append(tx, "audit", None, body, self._now()))

    def report_bundles(self, failures: Sequence[BundleFailure]) -> None:
        """Raise an alert for each failure, and clear those of all other tasks."""
        for failure in failures:
            log.error("task %s: %s", failure.task, _describe_failure(failure))
            self.raise_bundle_alert(failure)
        for task in self._models.keys() - {failure.task for failure in failures}:
            self.clear_bundle_alert(task)

    def raise_bundle_alert(self, failure: BundleFailure) -> None:
        """Raise the alert, unless it is open."""
        if self._store.load_state(failure.task, task_keys.BUNDLE_ALERT) is None:
            self._write_bundle_alert(failure.task, failure.bundle, _describe_failure(failure))

    def clear_bundle_alert(self, task: str) -> None:
        """Clear the alert, if it is open."""
        if self._store.load_state(task, task_keys.BUNDLE_ALERT) is not None:
            self._write_bundle_alert(task, self._conf.tasks[task].bundle, "")

    def _write_bundle_alert(self, task: str, bundle: str, reason: str) -> None:
        if reason:
            alert = BUNDLE_FAILED.raised(f"{task} {reason}"[:1000], bundle=bundle)
        else:
            alert = BUNDLE_FAILED.cleared(f"{task} runs again with bundle {bundle}.", bundle=bundle)

        def write(tx: Transaction) -> None:
            if reason:
                tx.save_state(task, task_keys.BUNDLE_ALERT, reason.encode())
            else:
                tx.delete_state(task, task_keys.BUNDLE_ALERT)
            self._message_log.append(tx, "alerts", task, alert.to_body(task), self._now())

        self._run_in_transaction(write)

    def _run_in_transaction(self, action: Callable[[Transaction], object]) -> None:
        try:
            with self._store.transaction() as tx:
                action(tx)
        except StorageFull as full:
            log.error("%s", full)


def _describe_failure(failure: BundleFailure) -> str:
    if failure.fallback:
        return f"goes on with {failure.fallback}: {failure.reason}"
    return f"does not run: {failure.reason}"


def interval_s(conf: Config) -> float:
    """Return the time between two health messages, which each of them promises."""
    return _INTERVAL_S if conf.broker.metered is None else _METERED_INTERVAL_S


def quote_acknowledgement(store: Store) -> AcknowledgementRef | None:
    """Return the newest acknowledgement that this device verified and stored; None before the first."""
    text = store.get_meta(retention.ACKNOWLEDGEMENT, "")
    if not text:
        return None
    stored = json.loads(text)
    ack = decoders.from_json(stored["payload"], AckPayload)
    return AcknowledgementRef(jws.claimed_kid(stored["jws"]), ack.log, ack.through, ack.time, ack.digest)


def build_body(conf: Config, store: Store, models: ModelsByTask) -> dict[str, Any]:
    """Return the body of a health message; `models` has the bundle reference of each running task."""
    counters = store.counters()
    waiting, _ = store.outbox_size()
    return {
        "agent": __version__,
        "interval_s": interval_s(conf),
        **({"groups": conf.device.groups} if conf.device.groups else {}),
        "streams": {name: {"rows": store.last_row(name), "first": store.first_row(name)} for name in conf.streams},
        "rejected": counters.get("lines rejected", 0),
        "tasks": {
            name: {
                "stream": task.stream,
                "row": store.cursor(name) or 0,
                "first": store.first_consumed(name),
                "windows": counters.get(f"windows.{name}", 0),
                "model": models.get(name),
                **deadline.to_status(store, counters, name, task.deadline),
                **overrides.to_status(store, name),
                **rollout_state.build_status(store, name, conf.device.id),
            }
            for name, task in conf.tasks.items()
        },
        "outbox": waiting,
        "store": {
            "bytes": store.used_bytes(),
            "max": int(conf.buffer.max_size),
            "hours": space.hours_until_eviction(store, store.limit_bytes()),
        },
    }
