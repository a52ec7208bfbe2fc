"""HTML page of a simulation's report: timeline of what was injected and found, roll-outs, false alarms, audit."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from outstation.foundation.render import html
from outstation.foundation.render.templates import create_environment
from outstation.foundation.text import format_span, list_names

_MAX_ROWS, _MAX_NAMES, _MAX_TICKS = 200, 3, 8
# Seconds between ticks of the time axis.
_TICK_STEPS = (10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400, 43_200, 86_400, 7 * 86_400, 30 * 86_400)
# Settings of events that are seconds.
_DURATIONS = frozenset({"ahead", "behind", "over", "delay"})
# On a phone each row of a table is a block, and the name of an event stands above its bar.
_CSS = (
    "td:first-child,.device{white-space:nowrap}td:nth-child(2){min-width:150px}"
    ".timeline{margin-right:24px}.event{display:grid;gap:0 14px;"
    "grid-template-columns:minmax(0,230px) minmax(0,1fr);align-items:center;font-size:13px;overflow-wrap:anywhere}"
    ".track{position:relative;height:28px;print-color-adjust:exact}.track>*{position:absolute}"
    ".track i{top:0;bottom:0;width:1px;background:var(--grid)}.bar{top:8px;height:12px;border-radius:3px;min-width:3px;"
    "background:var(--reference-edge)}.bar.missed{background:var(--drift)}.dot{top:7px;width:14px;height:14px;"
    "margin-left:-7px;border:3px solid var(--ok);border-radius:50%;background:var(--paper)}"
    ".dot.device{background:var(--ok)}.tick{top:4px;transform:translateX(-50%);white-space:nowrap;color:var(--muted);font-size:12.5px}"
    "@media(max-width:640px){.timeline{margin-left:12px}.event{grid-template-columns:minmax(0,1fr)}.event>:first-child{"
    "padding-top:4px}.track{height:24px}.bar{top:4px}.dot{top:3px}.tick:nth-of-type(even){display:none}"
    "th{display:none}tr{display:block;padding:10px 0;border-bottom:1px solid var(--grid)}"
    "td{display:block;border:0;padding:1px 0;overflow-wrap:anywhere}td:first-child{color:var(--muted)}}"
)


def render(report: Mapping[str, Any]) -> str:
    """Return a self-contained page of a report (`outstation.workbench.testing.simulation.simulation_report`)."""
    environment = create_environment(Path(__file__).parent)
    environment.filters.update(
        span=_short_span, settings=_format_settings, device_groups=_group_devices, number=lambda n: f"{n:,}",
        devices=lambda names: list_names(names, _MAX_NAMES) or "the collector",
    )  # fmt: skip
    # Numbers are those of the scenario.
    numbered = enumerate(report["events"][:_MAX_ROWS], 1)
    events = sorted(numbered, key=lambda entry: (entry[1]["at"], entry[0]))
    expected = [event for event in report["events"] if event["expects"]]
    answered = sum(len(event["found"]) for event in expected)
    alarms = report["false_alarms"]
    rolled = report["rollouts"]
    answers = {
        "expected and found": (answered, sum(len(event["devices"]) or 1 for event in expected)),
        "roll-outs as expected": (sum(rollout["passed"] for rollout in rolled), len(rolled)),
    }
    tiles = {
        **{name: f"{n} of {whole}" for name, (n, whole) in answers.items() if whole},
        f"false alarms, budget {alarms['budget']}": f"{alarms['n']}",
        "audit": "passed" if report["audit"]["passed"] else "failed",
        "messages": f"{report['messages']:,}",
        "peak memory": f"{report['peak_bytes'] / 2**20:,.0f} MiB",
    }
    chart = _build_timeline(events, max(float(report["simulated_seconds"]), 1.0))
    values = {"tiles": tiles, "events": events, "chart": chart}
    body = environment.get_template("report.html").render(report=report, max_rows=_MAX_ROWS, **values)
    return html.render_document("Simulated fleet", [html.Markup(body)], _CSS)


def _format_settings(event: Mapping[str, Any]) -> str:
    settings = [f"{name} {_format_setting(name, value)}" for name, value in event["settings"].items()]
    # A roll-out ends by its rules.
    lasts = (
        [] if "outcome" in event else ["to the end" if event["lasts"] is None else f"for {_short_span(event['lasts'])}"]
    )
    return ", ".join(lasts + settings)


def _format_setting(name: str, value: Any) -> str:
    if name in _DURATIONS:
        return _short_span(value)
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(value) if isinstance(value, list) else str(value)


def _short_span(seconds: float) -> str:
    """Return a span without a last part that is zero."""
    return format_span(seconds).removesuffix(" 00 s").removesuffix(" 00 min")


def _group_devices(devices: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for the devices that run the same version after the same phases, the smallest group first."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    # A device reports a phase again when its step changes.
    devices = [
        {**device, "phases": [next(same) for _, same in groupby(device["phases"], lambda each: each["phase"])]}
        for device in devices
    ]
    for device in devices:
        groups.setdefault((device["runs"], *(each["phase"] for each in device["phases"])), []).append(device)
    rows = []
    for (runs, *names), alike in sorted(groups.items(), key=lambda group: len(group[1]))[:_MAX_ROWS]:
        begins = [[device["phases"][place]["at"] for device in alike] for place in range(len(names))]
        phases = [
            f"{name} {_short_span(min(at))}" + (f" to {_short_span(max(at))}" if min(at) < max(at) else "")
            for name, at in zip(names, begins, strict=True)
        ]
        members = [device["device"] for device in alike]
        rows.append({"devices": members, "runs": runs, "phases": ", ".join(phases), "why": alike[0]["why"]})
    return rows


def _build_timeline(events: list[tuple[int, Mapping[str, Any]]], whole_s: float) -> dict[str, Any]:
    """Return a row for each event, with its time and the moments at which it was found, in percent of the run."""

    def percent(seconds: float) -> float:
        return round(100 * min(1.0, max(0.0, seconds / whole_s)), 2)

    rows = []
    for number, event in events:
        begin = percent(event["at"])
        end = percent(event["at"] + event["lasts"]) if event["lasts"] is not None else 100.0
        devices = event["devices"]
        where = f"{len(devices)} devices" if len(devices) > 1 else "".join(devices) or "the collector"
        row = {"name": f"{number} {event['kind']} {where}", "missed": event["missed"]}
        # One dot for all devices that no eye could tell apart.
        dots: dict[tuple[float, str], str] = {}
        for each in event["found"]:
            dots.setdefault((round(percent(each["at"]), 1), each["by"]), each["summary"])
        answers = [(*place, summary) for place, summary in dots.items()]
        rows.append(row | {"x": begin, "width": round(end - begin, 2), "found": answers})
    step_s = next((step for step in _TICK_STEPS if whole_s / step <= _MAX_TICKS), _TICK_STEPS[-1])
    ticks = [(percent(at), _short_span(at)) for at in range(0, int(whole_s) + 1, step_s)]
    return {"ticks": ticks, "rows": rows}
