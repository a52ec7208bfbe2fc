"""Alerts on results, from the daemon to the collector: raised and cleared in turn, also across kill -9."""

from __future__ import annotations

from typing import Any

from outstation.ml.model.bundle import builtin, bundle
from outstation.workbench.testing.fleet import LocalFleet
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import run_outstation

ROWS = 6000
LIMITS = (0.9, 0.97, 0.98, 0.985)
CLASS_RULE = """
[[tasks.exercise.alerts]]
name = "class-{number}"
label = "{label}"
for = "2 of 3"
severity = "critical"
summary = "{{device}}: {{label}} ({{score}}) at {{time}}"
"""
SCORE_RULE = """
[[tasks.exercise.alerts]]
name = "score-{number}"
score = "< {limit}"
for = "2 of 3"
"""
ALERTS = "SELECT id, state, severity, summary FROM alerts WHERE alert = 'result' ORDER BY seq"
RESULTS = "SELECT row, label, score FROM results ORDER BY row"


def expected_states(hits: list[bool]) -> list[str]:
    """Return the states of a rule "2 of 3" by its definition."""
    states: list[str] = []
    for end in range(1, len(hits) + 1):
        newest = hits[max(0, end - 3) : end]
        is_open = len(states) % 2 == 1
        if not is_open and sum(newest) >= 2 and newest[-1]:
            states.append("raised")
        elif is_open and len(newest) == 3 and not any(newest):
            states.append("cleared")
    return states


def test_alerts_reach_the_collector_once_each_although_the_daemon_is_killed(collector: LocalFleet) -> None:
    labels = bundle.read(builtin.bundles_dir() / "exercise", None).manifest.output.labels
    rules = [CLASS_RULE.format(number=number, label=label) for number, label in enumerate(labels)]
    rules += [SCORE_RULE.format(number=number, limit=limit) for number, limit in enumerate(LIMITS)]
    device = collector.add_device("pi-07").add_replay_stream(ROWS, speed=20)
    device.add_task("exercise", extra_toml="".join(rules))
    checked = run_outstation("check", "-c", str(device.config))
    assert f"2 of the last 3 results have label '{labels[0]}'" in checked.stdout
    device.start_and_wait()
    for share in (0.2, 0.5):
        wait_until("results arrive", lambda rows=share * ROWS: collector.last_result_row("pi-07") >= rows)  # type: ignore[misc]
        device.kill()
        device.start_and_wait()
    wait_until("all results arrive", lambda: collector.last_result_row("pi-07") >= ROWS - 200)
    wait_until("nothing is left to send", lambda: device.status()["outbox"]["waiting"] == 0)
    assert device.stop() == 0
    results = collector.query(RESULTS)
    expected = {f"class-{n}": expected_states([x == label for _, x, _ in results]) for n, label in enumerate(labels)}
    expected |= {f"score-{n}": expected_states([s < limit for *_, s in results]) for n, limit in enumerate(LIMITS)}
    by_rule: dict[str, list[tuple[Any, ...]]] = {name: [] for name in expected}
    for row in collector.query(ALERTS):
        by_rule[row[0].split("/")[1]].append(row)
    assert {name: [state for _, state, *_ in alerts] for name, alerts in by_rule.items()} == expected
    for name, alerts in by_rule.items():
        # An alert is raised and cleared under one number.
        assert [row[0] for row in alerts] == [f"exercise/{name}/result/{i // 2 + 1}" for i in range(len(alerts))]
    assert sum(map(len, by_rule.values())) >= 4
    summaries = [row[3] for row in by_rule["class-2"] if row[1:3] == ("raised", "critical")]
    assert summaries
    assert summaries[0].startswith(f"pi-07: {labels[2]} (0.")
    code, report = collector.audit()
    assert (code, report["passed"]) == (0, True)
