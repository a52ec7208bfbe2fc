"""Alert rules in the store: their states, and the end of alerts whose rule is no longer in the config."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec

from outstation.device.config import TaskConfig
from outstation.device.rules import batch_rules
from outstation.device.rules.batch_rules import TaskRuleStates
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog, PendingMessage
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import decoders
from outstation.foundation.clock import ClockReading

log = logging.getLogger("outstation")


def load(store: Store, task: str) -> TaskRuleStates:
    """Return the states of a task's rules; a state that cannot be read is that of no rule. Raises StorageError."""
    stored = store.load_state(task, task_keys.ALERT_RULES)
    try:
        return TaskRuleStates() if stored is None else decoders.from_msgpack(stored, TaskRuleStates)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        log.error("task %s: the states of its alert rules cannot be read, so its rules start again", task)
        return TaskRuleStates()


def save(tx: Transaction, task: str, states: TaskRuleStates) -> None:
    tx.save_state(task, task_keys.ALERT_RULES, msgspec.msgpack.encode(states))


def reconcile(store: Store, message_log: MessageLog, tasks: Mapping[str, TaskConfig], now: ClockReading) -> int:
    """Clear the alerts of rules that were removed or changed, also of removed tasks; return how many.

    An alert whose rule's state was lost with a damaged store clears, too. Called at each start, before any batch.
    Raises StorageError.
    """
    count = 0
    for name in sorted({*store.tasks_with_state(task_keys.ALERT_RULES), *tasks}):
        rules = {rule.name: rule for rule in tasks[name].alerts} if name in tasks else {}
        before = load(store, name)
        states, alerts = batch_rules.retire(rules, before.rules, name)
        states, lost = batch_rules.end_lost(states, store.open_alerts(name), name)
        alerts += lost
        if states == before.rules:
            continue
        with store.transaction(vital=True) as tx:
            save(tx, name, msgspec.structs.replace(before, rules=states))
            message_log.append_all(tx, [PendingMessage.from_alert(alert, name) for alert in alerts], now)
        count += len(alerts)
    return count
