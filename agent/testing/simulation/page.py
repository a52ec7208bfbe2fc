"""HTML page of a simulation's report: timeline of what was injected and found, roll-outs, false alarms, audit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from agent.render import html as page
from agent.render.html import Content, Markup, element, section, table
from agent.render.svg import html_text
from agent.text import format_span

_ROW, _LEFT, _RIGHT, _WIDTH, _BAR = 30, 230, 36, 940, 12
_MAX_ROWS, _MAX_NAMES, _MAX_TICKS = 200, 3, 8
# Seconds between ticks of the time axis.
_TICK_STEPS = (10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400, 43_200, 86_400, 7 * 86_400, 30 * 86_400)
# Settings of events that are seconds.
_DURATIONS = frozenset({"ahead", "behind", "over", "delay"})
_OUTCOME_STYLES = {"completed": "ok", "held": "none"}
# On a phone each row of a table is a block.
_CSS = (
    "td:first-child{white-space:nowrap}.timeline{min-width:640px;max-width:none}"
    ".timeline text{font-size:12.5px;fill:var(--ink)}"
    "@media(max-width:640px){th{display:none}tr{display:block;padding:10px 0;border-bottom:1px solid var(--grid)}"
    "td{display:block;border:0;padding:1px 0;overflow-wrap:anywhere}td:first-child{color:var(--muted)}}"
)


def render(report: Mapping[str, Any]) -> str:
    """Return a self-contained page of a report (`agent.testing.simulation.report`)."""
    return page.render_document("Simulated fleet", [*_build(report)], _CSS)


def _build(report: Mapping[str, Any]) -> Iterator[Markup]:
    events, alarms, audit = report["events"], report["false_alarms"], report["audit"]
    yield element("h1", "Simulated fleet")
    lead = f"{report['devices']} devices for {_short_span(report['simulated_seconds'])}, seed {report['seed']}."
    yield element("p", lead, css_class="muted")
    expected = sum(len(event["devices"]) or 1 for event in events if event["expects"])
    answered = sum(len(event["found"]) for event in events if event["expects"])
    tiles = {
        "expected and found": f"{answered} of {expected}",
        f"false alarms, budget {alarms['budget']}": f"{alarms['n']}",
        "audit": "passed" if audit["passed"] else "failed",
        "messages": f"{report['messages']:,}",
        "messages a second": f"{report['messages_per_second']:,.0f}",
        "peak memory": f"{report['peak_bytes'] / 2**20:,.0f} MiB",
    }
    boxes = (
        element("div", element("span", name), element("b", value), css_class="tile") for name, value in tiles.items()
    )
    yield element("div", *boxes, css_class="tiles")
    yield _verdict(report)
    if events:
        intro = (
            "A bar is the time of an event, orange if an alert is missing. A dot is the alert that answers it at a "
            "device, a ring one of the collector."
        )
        yield section("Timeline", intro, element("div", _timeline(report), css_class="scroll"))
        yield section("Injected and found", "", table(["at", "event", "devices", "found"], [*_event_rows(events)]))
    for rollout in report["rollouts"]:
        yield _describe_rollout(rollout)
    if alarms["alerts"]:
        rows = [
            [_short_span(alarm["at"]), alarm["device"] or "the fleet", alarm["by"], alarm["summary"]]
            for alarm in alarms["alerts"][:_MAX_ROWS]
        ]
        intro = (
            f"Alerts that no event explains; the first {_MAX_ROWS}."
            if alarms["n"] > _MAX_ROWS
            else "Alerts that no event explains."
        )
        yield section("False alarms", intro, table(["at", "device", "by", "alert"], rows))
    problems = [f"{each['device']} seq {each['seq']}: {each['reason']}" for each in audit["invalid"][:_MAX_ROWS]]
    text = f"{audit['messages']:,} signed messages of {audit['devices']} devices were verified again."
    yield section("Audit", text, *([page.bullet_list(problems)] if problems else []))
    yield element(
        "footer",
        f"{report['rows']:,} rows. Digest of all published messages: ",
        element("code", report["messages_digest"]),
    )


def _verdict(report: Mapping[str, Any]) -> Markup:
    problems = []
    if report["missed"]:
        problems.append(f"Expected alerts that did not come: {report['missed']}.")
    if report["false_alarms"]["n"] > report["false_alarms"]["budget"]:
        problems.append("There were more false alarms than the budget.")
    if not report["audit"]["passed"]:
        problems.append("The audit failed.")
    problems += [
        f"Roll-out {rollout['name']} is {rollout['outcome']}; expected is {rollout['ends']}."
        for rollout in report["rollouts"]
        if not rollout["passed"]
    ]
    if report["undelivered"]:
        problems.append(f"Messages of {len(report['undelivered'])} devices were not delivered.")
    if not problems:
        return element(
            "div",
            "Everything was found, within the budget of false alarms, and nothing was lost.",
            css_class="notice ok",
        )
    return element("div", page.bullet_list(problems), css_class="notice")


def _event_rows(events: list[Mapping[str, Any]]) -> Iterator[list[Content]]:
    for event in events[:_MAX_ROWS]:
        settings = ", ".join(f"{name} {_format_setting(name, value)}" for name, value in event["settings"].items())
        label = element("div", event["kind"], element("div", settings, css_class="muted"))
        yield [_short_span(event["at"]), label, _name_devices(event["devices"]), _describe_answer(event)]


def _describe_answer(event: Mapping[str, Any]) -> Content:
    """Return the first alert that answers an event, after how long, by whom, and where there is none."""
    answers, missed = event["found"], event["missed"]
    if "outcome" in event and not answers:
        return element("span", event["outcome"], css_class=f"state {_OUTCOME_STYLES.get(event['outcome'], 'warning')}")
    if not answers and not missed:
        return element("span", "nothing expected", css_class="state none")
    first = min(answers, key=lambda each: float(each["after"]), default=None)
    parts: list[Content] = []
    if first is not None:
        parts.append(element("span", f"{first['alert']} {first['subject']}", css_class="state ok"))
        text = f" after {_short_span(first['after'])} by the {first['by']}"
        if "shared_with" in first:
            text = f" open since event {first['shared_with']}"
        if len(answers) > 1:
            text += f", found at {len(answers)} devices"
        parts.append(text)
    if missed:
        text = "missed" if first is None else f"missed at {_name_devices(missed)}"
        parts.append(element("div", element("span", text, css_class="state warning")))
    return element("div", *parts)


def _describe_rollout(rollout: Mapping[str, Any]) -> Markup:
    """Return a section with the steps of a roll-out, and with what each device did."""
    steps = [
        [_short_span(step["at"]), step["label"], _count_phases(step["devices"]), step["why"]]
        for step in rollout["steps"]
    ]
    return section(
        f"Roll-out {rollout['name']} {rollout['version']}: {rollout['outcome']}",
        rollout["why"],
        table(["at", "step", "devices", "decision at its end"], steps),
        table(["devices", "runs", "phases", "last report of the first"], [*_device_rows(rollout["devices"])]),
    )


def _device_rows(devices: list[Mapping[str, Any]]) -> Iterator[list[Content]]:
    """Yield a row for the devices that run the same version after the same phases, the smallest group first."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for device in devices:
        groups.setdefault((device["runs"], *(each["phase"] for each in device["phases"])), []).append(device)
    for (runs, *names), alike in sorted(groups.items(), key=lambda group: len(group[1]))[:_MAX_ROWS]:
        begins = [[device["phases"][place]["at"] for device in alike] for place in range(len(names))]
        phases = [
            f"{name} {_short_span(min(at))}" + (f" to {_short_span(max(at))}" if min(at) < max(at) else "")
            for name, at in zip(names, begins, strict=True)
        ]
        yield [_name_devices([device["device"] for device in alike]), runs, ", ".join(phases), alike[0]["why"]]


def _count_phases(devices: Mapping[str, list[str]]) -> str:
    return ", ".join(f"{len(set(names))} {phase}" for phase, names in devices.items()) or "none"


def _format_setting(name: str, value: Any) -> str:
    if name in _DURATIONS:
        return _short_span(value)
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(value) if isinstance(value, list) else str(value)


def _short_span(seconds: float) -> str:
    """Return a span without a last part that is zero."""
    return format_span(seconds).removesuffix(" 00 s").removesuffix(" 00 min")


def _name_devices(devices: list[str]) -> str:
    rest = len(devices) - _MAX_NAMES
    return (", ".join(devices[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")) or "the collector"


def _timeline(report: Mapping[str, Any]) -> Markup:
    """Return a drawing with a row for each event: its time, and the moments at which it was found."""
    events = report["events"][:_MAX_ROWS]
    whole_s = max(float(report["simulated_seconds"]), 1.0)
    height = _ROW * (len(events) + 1)

    def x(seconds: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(1.0, max(0.0, seconds / whole_s))

    parts = []
    step_s = next((step for step in _TICK_STEPS if whole_s / step <= _MAX_TICKS), _TICK_STEPS[-1])
    for at in range(0, int(whole_s) + 1, step_s):
        parts.append(f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="0" y2="{height - _ROW}" stroke="var(--grid)"/>')
        parts.append(
            f'<text x="{x(at):.1f}" y="{height - 8}" text-anchor="middle" style="fill:var(--muted)">'
            f"{html_text(_short_span(at))}</text>"
        )
    for number, event in enumerate(events):
        middle = _ROW * number + _ROW / 2
        begin, end = x(event["at"]), x(event["at"] + event["lasts"] if event["lasts"] is not None else whole_s)
        color = "var(--drift)" if event["missed"] else "var(--reference-edge)"
        devices = event["devices"]
        where = f"{len(devices)} devices" if len(devices) > 1 else _name_devices(devices)
        name = f"{number + 1}  {event['kind']} {where}"
        parts.append(f'<text x="0" y="{middle + 4:.1f}">{html_text(name)}</text>')
        parts.append(
            f'<rect x="{begin:.1f}" y="{middle - _BAR / 2:.1f}" width="{max(3.0, end - begin):.1f}" height="{_BAR}" '
            f'rx="3" fill="{color}"/>'
        )
        for each in event["found"]:
            fill = "var(--ok)" if each["by"] == "device" else "var(--paper)"
            parts.append(
                f'<circle cx="{x(each["at"]):.1f}" cy="{middle:.1f}" r="5.5" fill="{fill}" stroke="var(--ok)" '
                f'stroke-width="2.5"><title>{html_text(each["summary"])}</title></circle>'
            )
    head = f'<svg class="timeline" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="Timeline of events">'
    return Markup(head + "".join(parts) + "</svg>")
