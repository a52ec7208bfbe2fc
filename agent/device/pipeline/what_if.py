"""What a task would cost with another schedule, batch or publish policy: from what it has cost so far."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
import numpy as np

from agent import config
from agent.config import PublishBelow
from agent.device.machine import schedule
from agent.device.store.cost import TaskCost
from agent.device.store.labels import StoredPredictions
from agent.errors import ConfigError, UsageError

# Of a results message, beside its columns: head, digests, signature, topic and properties. In a whole one of the
# exercise model it is 1,140 to 1,190 bytes.
ENVELOPE_BYTES = 1_160
# Bytes of a listed result with row, time, label and score, where none was listed so far.
_TYPICAL_RESULT_BYTES = 36.0
KEYS = ("schedule", "batch", "publish")
_BELOW_PATTERN = re.compile(r"below\s*=?\s*(\d+(?:\.\d+)?)")


class WhatIfScenario(msgspec.Struct, frozen=True):
    """What is to be otherwise; None: as it is. `interval_s` between runs, `batch` model windows at once."""

    interval_s: float | None = None
    batch: int | None = None
    publish: str | PublishBelow | None = None


class DailyCost(msgspec.Struct, frozen=True):
    """In a day: batches, model windows, results listed in messages; processor seconds and bytes on the air."""

    batches: float
    windows: float
    listed_results: float
    cpu_s: float
    sent_bytes: float


def parse_scenario(file: str, texts: Mapping[str, str]) -> WhatIfScenario:
    """Raises UsageError, with what can be written."""
    unknown = sorted(set(texts) - set(KEYS))
    if unknown:
        raise UsageError(f"--what-if {unknown[0]}: what can be otherwise is {', '.join(KEYS)}")
    batch, publish = texts.get("batch"), texts.get("publish")
    if batch is not None and not (batch.isascii() and batch.isdigit() and 1 <= int(batch) <= 1_000_000):
        raise UsageError(f"--what-if batch={batch}: give the model windows of a batch, as batch=512")
    return WhatIfScenario(
        _parse_interval(file, texts["schedule"]) if "schedule" in texts else None,
        int(batch) if batch else None,
        _parse_publish(publish) if publish is not None else None,
    )


def compute_current_cost(task: TaskCost, seconds: float) -> DailyCost:
    """As it was, over so many seconds."""
    a_day = 86_400 / seconds
    return DailyCost(
        task.batches * a_day,
        task.windows * a_day,
        task.listed * a_day,
        task.cpu_us / 1e6 * a_day,
        task.sent_bytes * a_day,
    )


def project_cost(
    task: TaskCost,
    seconds: float,
    scenario: WhatIfScenario,
    stored_predictions: list[StoredPredictions],
    publish: str | PublishBelow,
) -> DailyCost:
    """As it would be. `kept` are the newest results of the task, `publish` the policy by which they were listed."""
    before, a_day = compute_current_cost(task, seconds), 86_400 / seconds
    batches = before.batches
    if scenario.interval_s is not None or scenario.batch is not None:
        runs = 0.0 if scenario.interval_s is None else 86_400 / scenario.interval_s
        full = 0.0 if scenario.batch is None else before.windows / scenario.batch
        # A run that finds nothing to do makes no batch.
        batches = min(max(runs, full), before.windows)
    fixed_us, window_us = task.batch_and_window_us
    listed = before.listed_results
    if scenario.publish is not None:
        was = _published_share(stored_predictions, publish)
        all_of_them = listed / was if was else before.windows
        listed = min(before.windows, all_of_them * _published_share(stored_predictions, scenario.publish))
    messages = task.messages_by_kind.get("results", 0)
    columns = task.bytes_by_kind.get("results", 0) - messages * ENVELOPE_BYTES
    each = columns / task.listed if task.listed and columns > 0 else _TYPICAL_RESULT_BYTES
    others = (task.sent_bytes - task.bytes_by_kind.get("results", 0)) * a_day
    # A batch whose results take several messages goes on doing so.
    air = others + batches * ENVELOPE_BYTES * max(1.0, messages / max(1, task.batches)) + listed * each
    return DailyCost(batches, before.windows, listed, (batches * fixed_us + before.windows * window_us) / 1e6, air)


def _published_share(stored_predictions: list[StoredPredictions], publish: str | PublishBelow) -> float:
    """Of results, how many such a policy lists."""
    if publish == "all":
        return 1.0
    if publish == "summary":
        return 0.0
    if isinstance(publish, PublishBelow):
        scores = [given.score for given in stored_predictions if given.score is not None]
        return float(np.mean(np.concatenate(scores) < publish.below)) if scores else 1.0
    said = [given.predicted_class for given in stored_predictions if given.predicted_class is not None]
    if not said:
        return 1.0
    joined = np.concatenate(said)
    return float(np.mean(joined[1:] != joined[:-1])) if len(joined) > 1 else 1.0


def _parse_interval(file: str, text: str) -> float:
    try:
        schedule.parse(file, "task", text)
        if text.startswith("every "):
            return float(config.parse_duration(text.removeprefix("every ")))
    except (ConfigError, ValueError) as error:
        raise UsageError(f"--what-if schedule={text}: {getattr(error, 'problem', error)}") from None
    raise UsageError(f'--what-if schedule={text}: only intervals can be reckoned with, as "schedule=every 5 min"')


def _parse_publish(text: str) -> str | PublishBelow:
    if text in ("all", "changes", "summary"):
        return text
    if (below := _BELOW_PATTERN.fullmatch(text)) is not None:
        return PublishBelow(below=float(below[1]))
    raise UsageError(f"--what-if publish={text}: give all, changes, summary, or below=0.6")
