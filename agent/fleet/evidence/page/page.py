"""index.html: the folder for people who are no engineers. No script, light and dark, from a phone to paper."""

from __future__ import annotations

from collections.abc import Sequence

from agent import __version__
from agent.fleet.evidence.format.frameworks import PointSupport
from agent.fleet.evidence.format.manifest import FileEntry
from agent.fleet.evidence.gather.gather import EvidenceFacts
from agent.fleet.evidence.gather.sbom import Sbom
from agent.fleet.evidence.page import assurance, decisions, deployments, monitoring
from agent.fleet.evidence.page.elements import format_count, format_date, format_names, format_time, link
from agent.render import html as page
from agent.render.html import Markup, element

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
.chart{max-width:640px}
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
.stack td,.stack td.n{display:block;border:0;padding:1px 0;text-align:left}
.running td:nth-child(3)::before{content:"Devices: "}.running td:nth-child(4)::before{content:"Since: "}
.running td:nth-child(5)::before{content:"Decided by: "}.incidents td:nth-child(3)::before{content:"Lasted "}
.devices td:nth-child(2)::before{content:"Task: "}.devices td:nth-child(3)::before{content:"Runs: "}
.devices td:nth-child(4)::before{content:"Since: "}.devices td:nth-child(5)::before{content:"Decided by: "}
.devices td:nth-child(6)::before{content:"Last told: "}.ran td:nth-child(2)::before{content:"First begun: "}
.ran td:nth-child(3)::before{content:"Last begun: "}.ran td:nth-child(4)::before{content:"Times: "}
.ran td:nth-child(5)::before{content:"Devices: "}.ran td:nth-child(6)::before{content:"Running now: "}
.ran td:nth-child(7)::before{content:"Papers: "}.labelled td:nth-child(4)::before{content:"95 %: "}
.labelled td:nth-child(5)::before{content:"Labels: "}.labelled td:nth-child(6)::before{content:"How they came: "}
.labelled td:nth-child(7)::before{content:"As of "}
.compared td:nth-child(2)::before{content:"New one: "}.compared td:nth-child(3)::before{content:"Windows: "}
.compared td:nth-child(4)::before{content:"Alike: "}.compared td:nth-child(5)::before{content:"Time: "}
.compared td:nth-child(6)::before{content:"By labels: "}.compared td:nth-child(7)::before{content:"Expected: "}
.signatures td:nth-child(2)::before{content:"Signed by "}.signatures td:nth-child(3)::before{content:"Keys: "}
.signatures td:nth-child(4)::before{content:"Until "}
.points td:nth-child(3)::before{content:"Supported by: "}.points td:nth-child(4)::before{content:"Shows: "}
.points td:nth-child(5)::before{content:"Does not show: "}.stack td::before{color:var(--muted)}
main{padding:22px 14px 40px}h1{font-size:23px}th,td{padding-right:10px}}
"""
_TOC = {
    "running": "What runs", "models": "Models", "rollouts": "Roll-outs", "incidents": "Incidents", "drift": "Drift",
    "accuracy": "Accuracy", "decisions": "Decisions", "checks": "Checks", "keys": "Keys", "software": "Software",
    "not-here": "Not in here", "frameworks": "Frameworks", "check": "Check it",
}  # fmt: skip


def render_html(facts: EvidenceFacts, sbom: Sbom, points: Sequence[PointSupport], files: Sequence[FileEntry]) -> str:
    """The page."""
    body = [
        *_render_header(facts),
        _render_notice(facts),
        _render_toc(),
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
    return page.render_document(f"Evidence of fleet {facts.fleet}", body, _CSS)


def _render_header(facts: EvidenceFacts) -> list[Markup]:
    first, last = facts.span.first, facts.span.last
    when = (
        f"from {format_date(first)} to {format_date(last)}"
        if first and last and first[:10] != last[:10]
        else f"on {format_date(facts.as_of)}"
    )
    lead = (
        f"What the models of this fleet did {when}, who decided it, and what is not known. "
        f"As of {format_time(facts.as_of)} UTC."
    )
    open_now = sum(n for (_, state), n in facts.incident_counts.items() if state == "open")
    total = sum(facts.incident_counts.values())
    rollouts = {one.rollout for one in facts.decisions if one.rollout} | {row["rollout"] for row in facts.rollouts}
    models = {one.model.digest for one in facts.running_tasks if one.model}
    tiles = [
        _tile(
            "Devices",
            f"{len(facts.devices):,}",
            f"{len(facts.silent_devices):,} never told what runs" if facts.silent_devices else "all told what they run",
        ),
        _tile("Models in use", f"{len(models):,}", format_count(len(facts.running_tasks), "task") + " of devices"),
        _tile("Incidents", f"{total:,}", f"{open_now:,} open now"),
        _tile(
            "Roll-outs", f"{len(rollouts):,}", format_count(sum(facts.event_counts.values()), "decision") + " in all"
        ),
        _tile("Signed messages", f"{facts.message_count:,}", _verification_text(facts)),
    ]
    return [
        element("h1", f"Evidence of fleet {facts.fleet}"),
        element("p", lead, css_class="muted"),
        element("div", *tiles, css_class="tiles"),
    ]


def _verification_text(facts: EvidenceFacts) -> str:
    if not facts.message_count:
        return "none came"
    return "all verified" if facts.audit["passed"] else "not all is well: see checks"


def _tile(name: str, value: str, note: str) -> Markup:
    return element("div", element("span", name), element("b", value), element("span", note), css_class="tile")


def _render_notice(facts: EvidenceFacts) -> Markup:
    if not facts.message_count:
        return element(
            "div", "Nothing was collected yet, so this folder shows keys and software only.", css_class="notice"
        )
    bad, look = _list_problems(facts), _list_warnings(facts)
    if not bad and not look:
        text = "Nothing is open: the audit passed, no incident goes on, and every device told what it runs."
        return element("div", text, css_class="notice ok")
    title = element("b", "This is wrong" if bad else "Look at this first")
    return element("div", title, page.bullet_list([*bad, *look]), css_class="notice bad" if bad else "notice")


def _list_problems(facts: EvidenceFacts) -> list[str]:
    report, found = facts.audit, []
    if report["invalid_count"]:
        found.append(f"{format_count(report['invalid_count'], 'stored message')} cannot be verified.")
    if report["invalid_decisions_count"]:
        found.append(
            f"{format_count(report['invalid_decisions_count'], 'decision')} about roll-outs cannot be verified."
        )
    if report["undeclared_gaps"]:
        found.append(
            f"Messages are missing without an explanation ({format_count(report['undeclared_gaps'], 'range')})."
        )
    if report["duplicates"]:
        found.append(
            f"{format_count(report['duplicates'], 'reading or message', 'readings or messages')} used or kept twice."
        )
    found += [f"The repository of models: {problem}." for problem in facts.repository_problems]
    return found


def _list_warnings(facts: EvidenceFacts) -> list[str]:
    found = []
    for severity in ("critical", "warning"):
        those = [one for one in facts.incidents if one.state == "open" and one.severity == severity]
        if those:
            names = sorted({one.device or "the whole fleet" for one in those})
            n = facts.incident_counts[severity, "open"]
            where = format_names(names) if n == len(those) else f"{', '.join(names[:6])} and others"
            word = "critical incident" if severity == "critical" else "warning"
            found.append(f"{format_count(n, word)} {'goes' if n == 1 else 'go'} on: {where}.")
    if facts.silent_devices:
        found.append(f"What runs is not known for {format_names(facts.silent_devices)}.")
    stopped = sorted({one.device for one in facts.running_tasks if one.model is None})
    if stopped:
        found.append(f"A task does not run on {format_names(stopped)}.")
    return found


def _render_toc() -> Markup:
    return element("nav", *(link(f"#{identity}", name) for identity, name in _TOC.items()))


def _render_footer(facts: EvidenceFacts, files: Sequence[FileEntry]) -> Markup:
    size = sum(one.size for one in files) / 1e6
    return element(
        "footer",
        f"Made by outstation {__version__} of what the collector of fleet {facts.fleet} stored until "
        f"{format_time(facts.as_of)} UTC. {format_count(len(files) + 1, 'file')} of {size:.1f} MB, listed with their digests in ",
        link("manifest.json"),
        ".",
    )
