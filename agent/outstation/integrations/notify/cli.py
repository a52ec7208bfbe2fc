"""Output of `notify test` and `notify status`, of the fleet and of a device."""

from __future__ import annotations

import time
from collections.abc import Sequence

import click

from outstation.foundation import clock
from outstation.foundation.cli.output import echo_styled, emit, print_table
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import UsageError
from outstation.foundation.text import printable
from outstation.integrations.notify.config import NotifyConfig
from outstation.integrations.notify.queue import QueueConnection, TargetState, count_waiting, load_targets


def test_targets(file: str, config: NotifyConfig, name: str | None, sender: str, fleet: str, *, as_json: bool) -> None:
    """Send a test message to one target or to all, now; exit 1 if any fails."""
    from outstation.integrations.notify import sending
    from outstation.integrations.notify.delivery import SendFailed
    from outstation.integrations.notify.message import compose_test

    _require_targets(file, config, name)
    results = []
    for target, section in config.targets.items():
        if name not in (None, target):
            continue
        began, problem = time.monotonic(), None
        message = compose_test(target, sender=sender, fleet=fleet, now_s=time.time())
        try:
            sending.send(section, message)
        except SendFailed as failed:
            problem = str(failed)
        seconds = round(time.monotonic() - began, 3)
        results.append({"target": target, "ok": problem is None, "seconds": seconds, "error": problem})
    emit(results, as_json, lambda: _print_results(results), passed=all(result["ok"] for result in results))


def show_states(file: str, config: NotifyConfig, db: QueueConnection, *, as_json: bool) -> None:
    """Show what each target was sent, and what waits."""
    _require_targets(file, config, None)
    states, waiting = load_targets(db), count_waiting(db)
    rows = [_to_row(states.get(name) or TargetState(name), waiting.get(name, (0, 0.0))[0]) for name in config.targets]
    columns = ["target", "sent", "waiting", "rejected", "failures", "last_sent", "error"]
    cells = [["" if row[column] is None else row[column] for column in columns] for row in rows]
    emit(rows, as_json, lambda: print_table(columns, cells, "No target."))


def _to_row(state: TargetState, waiting: int) -> dict[str, object]:
    last = clock.to_rfc3339(round(state.sent_at * 1e6)) if state.sent_at else None
    counts = {"sent": state.sent, "waiting": waiting, "rejected": state.rejected, "failures": state.failures}
    return {"target": state.target, **counts, "last_sent": last, "error": state.error}


def _require_targets(file: str, config: NotifyConfig, name: str | None) -> None:
    if not config.targets:
        raise UsageError(f"{file}: no target; add a section [notify.targets.NAME], see docs/guides/notify.md")
    if name is not None and name not in config.targets:
        raise UsageError(f"{file}: no target {name!r}{did_you_mean(name, config.targets)}")


def _print_results(results: Sequence[dict[str, object]]) -> None:
    width = max((len(str(result["target"])) for result in results), default=0)
    for result in results:
        word = click.style("ok", fg="green") if result["ok"] else click.style("failed", fg="red")
        detail = "" if result["ok"] else f": {printable(str(result['error']))}"
        echo_styled(f"{result['target']:{width}}  {word} after {result['seconds']} s{detail}")
