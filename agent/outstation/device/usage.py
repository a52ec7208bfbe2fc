"""Usage of the device since its store was made: what health messages report, and estimates begin with."""

from __future__ import annotations

import msgspec

from outstation.device.config import Config
from outstation.device.store import cost
from outstation.device.store.rows import row_bytes
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import decoders
from outstation.foundation.costs.usage import Usage

# A message that carried raw rows: signature, topic and properties beside as many rows as the broker takes.
_RAW_ENVELOPE_BYTES = 800
# Name in table meta.
_COUNTED = "usage"


def stored_bytes(conf: Config, store: Store) -> int:
    """Return the bytes of all readings that the store ever took, without those that compression saves."""
    return sum(store.last_row(name) * row_bytes(stream) for name, stream in conf.streams.items())


def raw_bytes(conf: Config, task: str, rows: int) -> int:
    """Return what sending `rows` rows of a task's stream would take, packed in messages of the largest size."""
    size = row_bytes(conf.streams[conf.tasks[task].stream])
    rows_per_message = max(1, (conf.broker.max_message_bytes - _RAW_ENVELOPE_BYTES) // size)
    return rows * size + -(-rows // rows_per_message) * _RAW_ENVELOPE_BYTES


def save_usage(tx: Transaction, conf: Config, store: Store) -> Usage:
    """Save and return the usage of this moment, in the transaction that counts the time until now."""
    usage = measure_usage(conf, store)
    if usage.seconds >= 1:
        tx.set_meta(_COUNTED, msgspec.json.encode(usage).decode())
    return usage


def load_usage(conf: Config, store: Store) -> Usage:
    """Return the saved usage: batches since then have counted their inferences already, and no time."""
    text = store.get_meta(_COUNTED, "")
    return decoders.from_json(text, Usage) if text else measure_usage(conf, store)


def measure_usage(conf: Config, store: Store) -> Usage:
    """Return the usage of all tasks since the store was made; readings of a stream count once, however many use it."""
    counters = store.counters()
    process, task_costs = (
        cost.read_process_cost(counters),
        {name: cost.read_task_cost(counters, name) for name in conf.tasks},
    )
    raw: dict[str, int] = {}
    for name, task in task_costs.items():
        stream = conf.tasks[name].stream
        raw[stream] = max(raw.get(stream, 0), raw_bytes(conf, name, task.rows))
    return Usage(
        seconds=round(process.seconds, 1),
        cpu_s=None if process.cpu_s is None else round(process.cpu_s, 2),
        flash_bytes=process.written_bytes,
        air_bytes=process.sent_bytes + sum(task.sent_bytes for task in task_costs.values()),
        raw_bytes=sum(raw.values()),
        inferences=sum(task.windows for task in task_costs.values()),
        energy_j=None if process.own_energy_j is None else round(process.own_energy_j, 1),
    )
