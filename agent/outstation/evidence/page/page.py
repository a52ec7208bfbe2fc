"""index.html: the evidence folder for readers who are not engineers, from the templates beside this module.

The page has no script, loads nothing, and fits phone, screen (light and dark) and paper. A template decides what a
chapter shows; the modules beside it give the sentences, groups and charts. Every value is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from outstation import __version__
from outstation.evidence.format import frameworks
from outstation.evidence.format.frameworks import PointSupport
from outstation.evidence.format.manifest import FileEntry, TrustedKey
from outstation.evidence.gather.accuracy import select_headline
from outstation.evidence.gather.gather import EvidenceFacts
from outstation.evidence.gather.sbom import Sbom
from outstation.evidence.page import charts, deployments, formats, monitoring, statements
from outstation.foundation.render import html
from outstation.foundation.render.templates import Environment, create_environment
from outstation.foundation.text import format_interval, format_value, list_names
from outstation.ml.performance.metrics import display_name

_TEMPLATES = Path(__file__).parent / "templates"
_MAX_ROWS = 25
_CONTENTS = {
    "running": "Running models", "models": "Models", "rollouts": "Roll-outs", "incidents": "Incidents",
    "drift": "Drift", "accuracy": "Accuracy", "decisions": "Decisions", "checks": "Checks", "keys": "Keys",
    "software": "Software", "not-here": "Limitations", "frameworks": "Frameworks", "check": "Verify",
}  # fmt: skip


@cache
def _load_environment() -> Environment:
    environment = create_environment(_TEMPLATES)
    environment.globals["scroll_attributes"] = Markup(html.SCROLL_ATTRIBUTES)
    environment.filters.update(
        number=lambda n: f"{n:,}", counted=formats.format_count, names=list_names,
        time=formats.format_time, duration=formats.format_duration, interval=lambda m: format_interval(m.low, m.high),
        metric_text=lambda m: f"{display_name(m.metric)} {format_value(m.value)}", headline=select_headline,
        label_sources=monitoring.format_label_sources, coverage=monitoring.format_coverage,
        drift_notes=monitoring.list_drift_notes, card_notes=deployments.list_card_notes,
        drift_strip=lambda task: Markup(charts.draw_drift_strip(task["history"], task["devices"])),
        comparison=deployments.format_comparison,
        # `root 2` for 2.root.json
        role_label=lambda file: "{1} {0}".format(*file.split(".", 2)),
    )  # fmt: skip
    return environment


def render_html(facts: EvidenceFacts, sbom: Sbom, points: Sequence[PointSupport], files: Sequence[FileEntry]) -> str:
    begin_us, end_us = formats.parse_epoch_us(facts.span.first) or 0, formats.parse_epoch_us(facts.as_of) or 1
    # The roll-out chapter covers what devices did as planned.
    departures = [each for each in facts.decisions if not each.phase or each.phase in deployments.DEPARTURE_PHASES]
    decision_entries, shown = deployments.build_timeline(list(reversed(departures)), _MAX_ROWS)
    listed_digests = {card.digest for card in facts.bundles.cards}
    models = [task.model for task in facts.running_tasks if task.model]
    unlisted_models = sorted({str(model) for model in models if model.digest not in listed_digests})
    body = _load_environment().get_template("index.html").render(
        facts=facts, sbom=sbom, files=files, max_rows=_MAX_ROWS, contents=_CONTENTS, version=__version__,
        size_mb=sum(file.size for file in files) / 1e6,
        period=_describe_period(facts), tiles=_build_tiles(facts),
        problems=statements.list_problems(facts), warnings=statements.list_warnings(facts),
        running_groups=deployments.group_running_tasks(facts.running_tasks),
        cards=sorted(facts.bundles.cards, key=lambda card: (-card.running_tasks, card.name, card.created)),
        listed_digests=listed_digests, unlisted_models=unlisted_models,
        rollouts=deployments.describe_rollouts(facts),
        incident_total=sum(facts.incident_counts.values()), incidents_open=_count_open(facts),
        incident_lanes=Markup(charts.draw_incident_lanes(facts.incidents, begin_us, end_us)),
        accuracy=monitoring.group_accuracy(facts),
        decision_entries=decision_entries, decisions_not_shown=len(facts.decisions) - shown,
        keys=_group_keys(facts.keys), agent_versions=sorted({task.agent or "unknown" for task in facts.running_tasks}),
        licences=sorted(sbom.licence_counts.items(), key=lambda entry: (-entry[1], entry[0])),
        omissions=statements.list_omissions(facts), unknowns=statements.list_unknowns(facts),
        not_covered=frameworks.NOT_COVERED,
        frameworks=[(name, [p for p in points if p.framework == name]) for name in (frameworks.NIST, frameworks.ISO)],
    )  # fmt: skip
    css = (_TEMPLATES / "page.css").read_text(encoding="utf-8")
    return html.render_document(f"Evidence of fleet {facts.fleet}", [html.Markup(body)], css)


def _describe_period(facts: EvidenceFacts) -> str:
    first, last = facts.span.first, facts.span.last
    if first and last and first[:10] != last[:10]:
        return f"from {formats.format_date(first)} to {formats.format_date(last)}"
    return f"on {formats.format_date(facts.as_of)}"


def _count_open(facts: EvidenceFacts) -> int:
    return sum(n for (_, state), n in facts.incident_counts.items() if state == "open")


def _build_tiles(facts: EvidenceFacts) -> list[tuple[str, int, str]]:
    """Return name, number and note of each tile."""
    rollouts = {decision.rollout for decision in facts.decisions if decision.rollout}
    rollouts |= {row["rollout"] for row in facts.rollouts}
    models = {task.model.digest for task in facts.running_tasks if task.model}
    tasks = {task.task for task in facts.running_tasks}
    silent = len(facts.silent_devices)
    decisions = formats.format_count(sum(facts.event_counts.values()), "decision")
    verification = "all verified" if facts.audit["passed"] else "audit failed: see checks"
    return [
        ("Devices", len(facts.devices), f"{silent:,} without a report" if silent else "all report their models"),
        ("Models in use", len(models), f"in {formats.format_count(len(tasks), 'task')}"),
        ("Incidents", sum(facts.incident_counts.values()), f"{_count_open(facts):,} open"),
        ("Roll-outs", len(rollouts), f"{decisions} in total"),
        ("Signed messages", facts.message_count, verification if facts.message_count else "none received"),
    ]


def _group_keys(keys: Sequence[TrustedKey]) -> dict[str, Any]:
    operators = [key.kid for key in keys if key.role == "operator"]
    device_keys = [key for key in keys if key.role == "device"]
    retired = [key for key in device_keys if key.revoked or key.last_valid_seq is not None]
    return {
        "roles": [key for key in keys if key.role != "device"],
        "signer": next(iter(operators), ""),
        "former_operators": operators[1:],
        "retired": retired,
        "valid": [key for key in device_keys if key not in retired],
        "by_operator": sum(key.made_by == "operator" for key in device_keys),
    }
