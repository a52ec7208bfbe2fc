"""index.html: the evidence folder for readers who are not engineers.

The page has no script, loads nothing, and fits phone, screen (light and dark) and paper.
"""

from __future__ import annotations

from collections.abc import Sequence

from agent import __version__
from agent.fleet.evidence.format.frameworks import PointSupport
from agent.fleet.evidence.format.manifest import FileEntry
from agent.fleet.evidence.gather.gather import EvidenceFacts
from agent.fleet.evidence.gather.sbom import Sbom
from agent.fleet.evidence.page import assurance, decisions, deployments, monitoring
from agent.fleet.evidence.page.elements import format_count, format_date, format_names, format_time, link
from agent.render import html
from agent.render.html import Markup, element

# Labels of table cells that stack on a narrow screen: class of the table → column → label.
_STACKED_LABELS = {
    "running": {3: "Devices: ", 4: "Since: ", 5: "Decided by: "},
    "devices": {2: "Task: ", 3: "Model: ", 4: "Since: ", 5: "Decided by: ", 6: "Last report: "},
    "ran": {2: "First start: ", 3: "Last start: ", 4: "Starts: ", 5: "Devices: ", 6: "Running now: ", 7: "Documents: "},
    "incidents": {3: "Lasted: "},
    "compared": {
        2: "New model: ",
        3: "Windows: ",
        4: "Agreement: ",
        5: "Latency ratio: ",
        6: "Accuracy gain: ",
        7: "Expected gain: ",
    },
    "labelled": {4: "95 %: ", 5: "Labels: ", 6: "Coverage: ", 7: "As of: "},
    "roles": {2: "Key: ", 3: "Signs: "},
    "keys": {2: "Key: ", 3: "Since: ", 4: "State: "},
    "signatures": {2: "Signed by: ", 3: "Keys: ", 4: "Expires: "},
    "points": {3: "Supported by: ", 4: "Demonstrates: ", 5: "Limitations: "},
}
_CSS = """
a{color:var(--series-0)}
nav{display:flex;flex-wrap:wrap;gap:6px 16px;margin:18px 0 0;font-size:14px}
section{scroll-margin-top:12px}
h3{margin:0 0 4px}
.fixed{white-space:nowrap}
.state.bad{color:var(--fault)}
.notice.bad{border-color:var(--fault);background:var(--fault-band)}
details{margin:10px 0;border-top:1px solid var(--grid);padding-top:8px}
summary{cursor:pointer;color:var(--muted);font-size:14px}
.chart{max-width:520px}.chart svg{max-width:470px}
.card+.card{margin-top:14px}.grid>.card+.card{margin-top:0}
.history{margin-top:18px}
.card .notes{margin:6px 0 8px}
.timeline{list-style:none;margin:12px 0;padding:0 0 0 18px;border-left:2px solid var(--grid)}
.timeline li{position:relative;margin:0 0 12px;max-width:80ch;overflow-wrap:anywhere}
.timeline li::before{content:"";position:absolute;left:-23.5px;top:7px;width:9px;height:9px;border-radius:50%;
background:var(--series-0)}
.when,.who{display:block;color:var(--muted);font-size:13px}
pre{background:var(--panel);border:1px solid var(--grid);border-radius:8px;padding:10px 14px;overflow-x:auto}
pre code{overflow-wrap:normal}
li{overflow-wrap:anywhere}
td{min-width:90px}td.n{min-width:0}
@media(max-width:560px){
.stack th{display:none}.stack tr{display:block;padding:10px 0;border-bottom:1px solid var(--grid)}
.stack tr:first-child{padding:0}
.stack td,.stack td.n{display:block;border:0;padding:1px 0;text-align:left}
STACKED
.stack td::before{color:var(--muted)}
main{padding:22px 14px 40px}h1{font-size:23px}th,td{padding-right:10px}}
"""
_TOC = {
    "running": "Running models", "models": "Models", "rollouts": "Roll-outs", "incidents": "Incidents",
    "drift": "Drift", "accuracy": "Accuracy", "decisions": "Decisions", "checks": "Checks", "keys": "Keys",
    "software": "Software", "not-here": "Limitations", "frameworks": "Frameworks", "check": "Verify",
}  # fmt: skip


def render_html(facts: EvidenceFacts, sbom: Sbom, points: Sequence[PointSupport], files: Sequence[FileEntry]) -> str:
    body = [
        *_render_header(facts),
        _render_notice(facts),
        element("nav", *(link(f"#{identity}", name) for identity, name in _TOC.items())),
        deployments.render_running(facts),
        deployments.render_models(facts),
        decisions.render_rollouts(facts),
        monitoring.render_incidents(facts),
        monitoring.render_drift(facts),
        monitoring.render_accuracy(facts),
        decisions.render_decisions(facts),
        assurance.render_checks(facts),
        assurance.render_keys(facts),
        assurance.render_software(sbom, facts),
        assurance.render_limitations(facts),
        assurance.render_frameworks(points),
        assurance.render_verification_steps(facts),
        _render_footer(facts, files),
    ]
    labels = (
        f'.{name} td:nth-child({column})::before{{content:"{label}"}}'
        for name, columns in _STACKED_LABELS.items()
        for column, label in columns.items()
    )
    return html.render_document(f"Evidence of fleet {facts.fleet}", body, _CSS.replace("STACKED", "\n".join(labels)))


def _render_header(facts: EvidenceFacts) -> list[Markup]:
    first, last = facts.span.first, facts.span.last
    period = f"on {format_date(facts.as_of)}"
    if first and last and first[:10] != last[:10]:
        period = f"from {format_date(first)} to {format_date(last)}"
    lead = (
        f"The models of this fleet {period}: their operation, who decided what, and what is unknown. "
        f"As of {format_time(facts.as_of)} UTC."
    )
    open_now = sum(n for (_, state), n in facts.incident_counts.items() if state == "open")
    total = sum(facts.incident_counts.values())
    rollouts = {decision.rollout for decision in facts.decisions if decision.rollout}
    rollouts |= {row["rollout"] for row in facts.rollouts}
    models = {task.model.digest for task in facts.running_tasks if task.model}
    silent = len(facts.silent_devices)
    decision_count = sum(facts.event_counts.values())
    verification = "all verified" if facts.audit["passed"] else "audit failed: see checks"
    tiles = [
        ("Devices", len(facts.devices), f"{silent:,} without a report" if silent else "all report their models"),
        ("Models in use", len(models), f"in {format_count(len(facts.running_tasks), 'task')}"),
        ("Incidents", total, f"{open_now:,} open"),
        ("Roll-outs", len(rollouts), f"{format_count(decision_count, 'decision')} in total"),
        ("Signed messages", facts.message_count, verification if facts.message_count else "none received"),
    ]
    shown = [
        element("div", element("span", name), element("b", f"{value:,}"), element("span", note), css_class="tile")
        for name, value, note in tiles
    ]
    return [
        element("h1", f"Evidence of fleet {facts.fleet}"),
        element("p", lead, css_class="muted"),
        element("div", *shown, css_class="tiles"),
    ]


def _render_notice(facts: EvidenceFacts) -> Markup:
    if not facts.message_count:
        text = "Nothing was collected yet, so this folder shows only keys and software."
        return element("div", text, css_class="notice")
    problems, warnings = _list_problems(facts), _list_warnings(facts)
    if not problems and not warnings:
        text = "The audit passed, no incident is open, and every device reported its models."
        return element("div", text, css_class="notice ok")
    title = element("b", "Problems" if problems else "Needs attention")
    listed = html.bullet_list([*problems, *warnings])
    return element("div", title, listed, css_class="notice bad" if problems else "notice")


def _list_problems(facts: EvidenceFacts) -> list[str]:
    report, problems = facts.audit, []
    if report["invalid_count"]:
        problems.append(f"{format_count(report['invalid_count'], 'stored message')} cannot be verified.")
    if report["invalid_decisions_count"]:
        count = format_count(report["invalid_decisions_count"], "roll-out decision")
        problems.append(f"{count} cannot be verified.")
    if report["undeclared_gaps"]:
        count = format_count(report["undeclared_gaps"], "range")
        problems.append(f"Messages are missing without an explanation ({count}).")
    if report["duplicates"]:
        count = format_count(report["duplicates"], "reading or message", "readings or messages")
        problems.append(f"{count} used or stored twice.")
    return [*problems, *(f"Model repository: {problem}." for problem in facts.repository_problems)]


def _list_warnings(facts: EvidenceFacts) -> list[str]:
    warnings = []
    for severity, noun in (("critical", "critical incident"), ("warning", "warning")):
        listed = [
            incident for incident in facts.incidents if incident.state == "open" and incident.severity == severity
        ]
        if listed:
            names = sorted({incident.device or "the whole fleet" for incident in listed})
            n = facts.incident_counts[severity, "open"]
            where = format_names(names) if n == len(listed) else f"{', '.join(names[:6])} and others"
            warnings.append(f"{format_count(n, noun)} open: {where}.")
    if facts.silent_devices:
        warnings.append(f"The models on {format_names(facts.silent_devices)} are unknown.")
    stopped = sorted({task.device for task in facts.running_tasks if task.model is None})
    if stopped:
        warnings.append(f"A task is stopped on {format_names(stopped)}.")
    return warnings


def _render_footer(facts: EvidenceFacts, files: Sequence[FileEntry]) -> Markup:
    size = sum(file.size for file in files) / 1e6
    text = (
        f"Made by outstation {__version__} from the database of fleet {facts.fleet} as of {format_time(facts.as_of)} "
        f"UTC. {format_count(len(files) + 1, 'file')}, {size:.1f} MB, listed with their SHA-256 in "
    )
    return element("footer", text, link("manifest.json"), ".")
