"""The page's chapters on what happened: what runs, models, roll-outs, incidents, drift, accuracy, decisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from agent.evaluation import page
from agent.evaluation.page import Content, Markup, element, table
from agent.evaluation.words import figure, interval, metric_name
from agent.fleet.evidence import pictures
from agent.fleet.evidence.accuracy import headline
from agent.fleet.evidence.contents import Card, Decision, Incident, Running
from agent.fleet.evidence.gather import Facts
from agent.fleet.evidence.words import count, epoch, few, moment, sentence, span

_ROWS = 25
_DEVICES = 40
_STEPS = 60
_STATES = {"open": ("goes on", "bad"), "over": ("over", "ok"), "unknown": ("end unknown", "none")}
_ROLLOUTS = {"finished": "ok", "aborted": "bad", "running": "warning", "paused": "warning"}
_KINDS = {
    "classify": "Names a class",
    "several": "Names any number of classes",
    "regress": "Gives a number",
    "anomaly": "Tells what is unusual",
}
_PHASES = {
    "not chosen": "not chosen for it",
    "fetching": "fetching it",
    "refused": "refused it",
    "shadow": "trying it beside the old model",
    "probation": "running it on probation",
    "settled": "run it for good",
    "rolled back": "took it back",
    "withdrawn": "left it, as told",
}


def chapter(identity: str, title: str, lead: str, *content: Markup) -> Markup:
    """A section that the table of contents leads to."""
    inner = page.section(title, lead, *content).html
    return Markup(inner.replace("<section>", f'<section id="{escape(identity)}">', 1))


def badge(word: str, kind: str) -> Markup:
    return element("span", word, kind=f"state {kind}")


def link(path: str, name: str = "") -> Markup:
    return Markup(f'<a href="{escape(path)}">{escape(name or path)}</a>')


def more(left: int, path: str, what: str = "more") -> list[Markup]:
    """Where the rest is, where there is one."""
    return [element("p", f"{left:,} {what} in ", link(path), ".", kind="muted")] if left > 0 else []


# --- what runs where ---


def running(facts: Facts) -> Markup:
    lead = (
        "What each device last said it runs, signed by the device. Since when and by whom: from its signed record of "
        "the change."
    )
    if not facts.running:
        return chapter("running", "What runs where", lead, element("p", "No device has told yet what it runs."))
    groups: dict[tuple[str, str], list[Running]] = {}
    for one in facts.running:
        groups.setdefault((one.task, str(one.model) if one.model else ""), []).append(one)
    rows: list[Sequence[Content]] = [_group(task, model, those) for (task, model), those in sorted(groups.items())]
    head = ["Task", "Model", "Devices", "Since", "Decided by"]
    per_device: list[Sequence[Content]] = [
        [one.device, one.task, _model(one), moment(one.since) if one.since else "not told", one.who, moment(one.told)]
        for one in facts.running[:_DEVICES]
    ]
    names = ["Device", "Task", "Model", "Since", "Decided by", "Last told"]
    listed = details(
        f"Device by device ({len(facts.running):,})",
        table(names, per_device),
        *more(len(facts.running) - _DEVICES, "running.json"),
    )
    silent = []
    if facts.silent:
        verb = "has" if len(facts.silent) == 1 else "have"
        text = f"{few(facts.silent)} {verb} not told what runs: what runs there is not known."
        silent = [element("p", text, kind="notice")]
    return chapter("running", "What runs where", lead, table(head, rows, (2,)), *silent, listed)


def _group(task: str, model: str, those: Sequence[Running]) -> list[Content]:
    since = sorted(one.since for one in those if one.since)
    when = moment(since[0]) if since else "not told"
    if since and since[0][:16] != since[-1][:16]:
        when = f"{moment(since[0])} to {moment(since[-1])}"
    ranked = Counter(one.who for one in those).most_common()
    deciders = [f"{name} ({n:,})" if n < len(those) else name for name, n in ranked]
    name = model or "none: the task does not run"
    return [task, Markup(f"<b>{escape(name)}</b>"), f"{len(those):,}", when, few(deciders, 3)]


def _model(one: Running) -> Content:
    return str(one.model) if one.model else badge("does not run", "bad")


def details(summary: str, *content: Markup) -> Markup:
    inside = "".join(one.html for one in content)
    return Markup(f"<details><summary>{escape(summary)}</summary>{inside}</details>")


# --- the models ---


def models(facts: Facts) -> Markup:
    lead = (
        "Each bundle holds one model with its papers. A device runs none unless its signature fits a "
        "publisher's key that it knows."
    )
    cards = sorted(facts.bundles.cards, key=lambda card: (-card.devices, card.name, card.created))
    known = {card.digest for card in cards}
    parts = [element("div", *(_card(card) for card in cards[:_ROWS]), kind="grid")] if cards else []
    unknown = sorted({str(o.model) for o in facts.running if o.model and o.model.digest not in known})
    if unknown:
        text = f"Runs in the fleet, but its papers were not found here: {few(unknown)}. Add them with --bundle."
        parts.append(element("p", text, kind="notice"))
    if facts.bundles.unread:
        parts.append(element("p", f"Could not be read: {few(facts.bundles.unread, 3)}.", kind="notice"))
    if not parts:
        parts.append(element("p", "No model was published here, and none is known to run."))
    return chapter("models", "The models", lead, *parts, *more(len(cards) - _ROWS, "manifest.json", "more bundles"))


def _card(card: Card) -> Markup:
    runs = f"runs for {count(card.devices, 'task')}" if card.devices else "does not run now"
    signed = f"signed by a listed publisher ({card.signer[:10]}…)" if card.checked else _unchecked(card)
    does = f"{_KINDS.get(card.kind, card.kind)}, from {count(len(card.fields), 'input')}"
    facts = [
        f"{does}; made {card.created[:10]}; {runs}.",
        f"{sentence(signed)}.",
    ]
    metrics = [one for one in card.metrics if not one.slice and one.value is not None][:3]
    if metrics:
        told = ", ".join(
            f"{metric_name(m.metric)} {figure(m.value)} {interval(m.low, m.high)}".strip() for m in metrics
        )
        facts.append(f"Evaluated {card.evaluated[:10]}: {told} (95 % intervals).")
    else:
        facts.append("No evaluation was given for it.")
    facts += card.warnings[:3]
    names = {"MODEL_CARD.md": "model card", "DATA_CARD.md": "data card", "evaluation.json": "evaluation"}
    links = [link(f"{card.folder}/{name}", shown) for name, shown in names.items() if name in card.files]
    links.append(link(f"{card.folder}/manifest.json", "manifest"))
    joined = Markup(" · ".join(one.html for one in links))
    about = [element("p", card.about[:260] + ("…" if len(card.about) > 260 else ""))] if card.about else []
    state = badge("in use", "ok") if card.devices else badge("not in use", "none")
    title = Markup(f"<h3>{escape(card.name)} {escape(card.version)} {state.html}</h3>")
    digest = element("p", element("code", card.digest), kind="muted")
    return element("div", title, *about, page.bullets(facts, "notes"), element("p", joined), digest, kind="card")


def _unchecked(card: Card) -> str:
    if not card.signer:
        return "not signed"
    return f"its signature (key {card.signer[:10]}…) was not checked: that publisher's key was not given"


# --- roll-outs ---


def rollouts(facts: Facts) -> Markup:
    lead = "How new models came to devices: step by step, each with the numbers it was decided on."
    named: dict[str, list[Decision]] = {}
    for one in facts.decisions:
        if one.rollout:
            named.setdefault(one.rollout, []).append(one)
    known = {row["rollout"]: row for row in facts.rollouts}
    # The newest first.
    order = sorted({*named, *known}, key=lambda name: _began(name, known, named), reverse=True)
    if not order:
        text = "No model was rolled out: what runs was put there by each device's configuration."
        return chapter("rollouts", "Roll-outs", lead, element("p", text))
    cards = [_rollout(name, known.get(name), named.get(name, []), facts) for name in order[:_ROWS]]
    return chapter(
        "rollouts", "Roll-outs", lead, *cards, *more(len(order) - _ROWS, "decisions.jsonl", "roll-outs more")
    )


def _began(name: str, known: dict[str, dict[str, Any]], named: dict[str, list[Decision]]) -> str:
    return str(known[name]["started"]) if name in known else named[name][0].time


def _rollout(name: str, row: dict[str, Any] | None, told: list[Decision], facts: Facts) -> Markup:
    state = str(row["state"]) if row else "told by devices only"
    what = f"{row['bundle']} {row['version']} for task {row['task']}, started {moment(row['started'])}." if row else ""
    title = Markup(f"<h3>{escape(name)} {badge(state, _ROLLOUTS.get(state, 'none')).html}</h3>")
    phases = [one for one in facts.phases if one["rollout"] == name]
    ended = "; ".join(
        f"{count(p['devices'], 'device')} {_PHASES.get(p['phase'], p['phase'])}"
        + (f" ({p['reason']})" if p["reason"] else "")
        for p in phases
    )
    now = [element("p", f"By their last word: {ended}.")] if ended else []
    steps = [one for one in told if one.payload is not None]
    # What devices did by themselves, of which only what departs from the plan is worth a line each.
    steps += [one for one in told if one.payload is None and _is_noteworthy(one)]
    steps.sort(key=lambda one: one.time)
    if not steps:
        steps = told
    lead = [element("p", what, kind="muted")] if what else []
    hidden = len(told) - min(len(steps), _STEPS)
    return element("div", title, *lead, *now, timeline(steps[:_STEPS]), *more(hidden, "decisions.jsonl"), kind="card")


_NOTEWORTHY = ("rolled back", "taken back", "took back", "refused", "crash", "withdrawn")


def _is_noteworthy(one: Decision) -> bool:
    return any(word in one.summary for word in _NOTEWORTHY)


def timeline(decisions: Iterable[Decision]) -> Markup:
    items = []
    for one in decisions:
        where = f" · {one.device}" if one.device else ""
        head = element("span", f"{moment(one.time)}{where} · {one.event}", kind="when")
        items.append(
            element("li", head, element("span", one.summary or one.event), element("span", one.who, kind="who"))
        )
    return Markup(f'<ol class="timeline">{"".join(item.html for item in items)}</ol>')


# --- incidents ---


def incidents(facts: Facts) -> Markup:
    counts = facts.incident_counts
    total, open_now = sum(counts.values()), sum(n for (_, state), n in counts.items() if state == "open")
    lead = "Alerts, from the moment a device raised one to the moment it cleared it. Times are the device's own, UTC."
    if not total:
        return chapter("incidents", "Incidents", lead, element("p", "No alert was raised in the time that is told of."))
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in facts.incident_kinds.most_common())
    said = f"{count(total, 'incident')} in all ({kinds}); {open_now:,} {'goes' if open_now == 1 else 'go'} on."
    rows: list[Sequence[Content]] = [_incident(one) for one in facts.incidents[:_ROWS]]
    head = ["", "Began", "Lasted", "Where", "What"]
    picture = pictures.lanes(facts.incidents, epoch(facts.span.first) or 0, epoch(facts.at) or 1)
    key = "red: critical; orange: warning; grey: information. A bar to the right edge goes on."
    shown = [element("div", Markup(picture), element("p", key, kind="muted"), kind="card chart")] if picture else []
    rest = more(total - min(total, _ROWS), "incidents.json")
    unsure = sum(one.clock == "unsynced" for one in facts.incidents)
    notes = []
    if unsure:
        text = f"{count(unsure, 'incident')} began or ended while the device's clock was not set: how long is unsure."
        notes = [element("p", text, kind="muted")]
    for_sheets = element("p", "For a spreadsheet: ", link("incidents.csv"), ".", kind="muted")
    parts = [*shown, table(head, rows), *rest, *notes, for_sheets]
    return chapter("incidents", "Incidents", lead, element("p", said), *parts)


def _incident(one: Incident) -> list[Content]:
    word, kind = _STATES[one.state]
    kind = "warning" if kind == "bad" and one.severity != "critical" else kind
    where = f"{one.device or 'the fleet'}" + (f", {one.task}" if one.task else "")
    lasted = span(one.seconds) + (" so far" if one.state == "open" else "")
    tail = "" if one.source == "device" else " (noticed by the collector; not signed)"
    what = Markup(f"<b>{escape(one.severity)}, {escape(one.alert)}.</b> {escape(one.summary + tail)}")
    return [
        badge(word, kind),
        nowrap(moment(one.began)),
        nowrap(lasted if one.seconds is not None else "–"),
        where,
        what,
    ]


def nowrap(text: str) -> Markup:
    return Markup(f'<span class="fixed">{escape(text)}</span>')


# --- drift ---


def drift(facts: Facts) -> Markup:
    lead = (
        "Whether sites still look like what the models know. Counted by the collector from the drift summaries that "
        "devices signed; the summaries stay in its database, the alerts that came of them are here."
    )
    tasks = facts.drift["tasks"]
    if not tasks:
        return chapter("drift", "Drift", lead, element("p", "No drift summary was collected: drift was not watched."))
    cards = [_drift_card(one) for one in tasks[:_ROWS]]
    unread = facts.drift["windows_unreadable"]
    notes = [element("p", f"{unread:,} summaries could not be read and are left out.", kind="notice")] if unread else []
    return chapter("drift", "Drift", lead, element("div", *cards, kind="grid"), *notes)


def _drift_card(one: dict[str, Any]) -> Markup:
    apart = " (devices with another reference than most)" if one["apart"] else ""
    now, moved = one["devices_in_drift"], one["moved"]
    lines = [
        f"{count(one['windows'], 'summary', 'summaries')} of {count(one['devices'], 'device')}; "
        f"{one['windows_with_a_sensor_fault']:,} with a sensor fault.",
        f"In drift by the last summary: {few(now)}." if now else "No device is in drift by its last summary.",
    ]
    if one["expected_accuracy"] is not None:
        lines.append(f"Accuracy that the models' own scores lead one to expect: {one['expected_accuracy']:.3f}.")
    lines += [wide["summary"] for wide in one["wide"][:3]]
    rows: list[Sequence[Content]] = [
        [e["device"], e["field"], moment(e["alarmed"]), moment(e["ended"]) if e["ended"] else "goes on"]
        for e in moved[:8]
    ]
    listed = [table(["Device", "Field", "Noticed", "Until"], rows)] if rows else []
    rest = more(len(moved) + one["moved_left_out"] - 8, "drift.json")
    picture = pictures.strip(one["history"], one["devices"])
    key = element("p", "orange: devices in drift; red: with a sensor fault", kind="muted")
    return page.card(one["task"] + apart, "", picture, key, page.bullets(lines, "notes"), *listed, *rest)


# --- accuracy ---


def accuracy(facts: Facts) -> Markup:
    lead = (
        "What labels from the sites say of the models' answers, with 95 % intervals. Without labels nothing is known."
    )
    if not facts.measured:
        text = (
            "No labels came: how often the models were right in operation was not measured. Evaluations before use are "
            "with the models above."
        )
        return chapter("accuracy", "Accuracy and labels", lead, element("p", text, kind="notice"))
    by_task: dict[str, list[Any]] = {}
    for one in facts.measured:
        by_task.setdefault(one.task, []).append((one, headline(one)))
    cards = []
    for task, those in by_task.items():
        told = [(one, metric) for one, metric in those if metric is not None and metric.value is not None]
        name = metric_name(told[0][1].metric) if told else "no metric yet"
        picture = pictures.accuracies(told[:20], f"{task}: {name} by device") if told else ""
        cards.append(page.card(f"{task}: {name}", _worst(told, those), picture))
    rows: list[Sequence[Content]] = [
        [
            one.device,
            one.task,
            "–" if metric is None else f"{metric_name(metric.metric)} {figure(metric.value)}",
            "" if metric is None else interval(metric.low, metric.high),
            _labels(one.labels),
            _labelling(one.labelling),
            moment(one.time) if one.time else "–",
        ]
        for those in by_task.values()
        for one, metric in those[:_ROWS]
    ]
    head = ["Device", "Task", "Figure", "95 % interval", "Labels", "How they came", "As of"]
    listed = details("Labels and figures by device", table(head, rows))
    return chapter("accuracy", "Accuracy and labels", lead, element("div", *cards, kind="grid"), listed)


def _worst(told: Sequence[Any], those: Sequence[Any]) -> str:
    devices = count(len({one.device for one, _ in those}), "device")
    return f"{devices} with labels" + (", the worst first" if len(told) > 1 else "")


def _labels(labels: dict[str, int]) -> str:
    names = {"human": "people", "system": "other systems", "model": "the model itself (not counted)"}
    return ", ".join(f"{n:,} by {names.get(source, source)}" for source, n in labels.items()) or "not told"


def _labelling(told: dict[str, Any]) -> str:
    parts = []
    if isinstance(coverage := told.get("coverage"), int | float):
        parts.append(f"for {coverage:.0%} of results")
    delay = told.get("delay_s")
    if isinstance(delay, dict) and isinstance(median := delay.get("median"), int | float):
        parts.append(f"after {span(median)} in the middle")
    for name in ("replaced", "late", "unmatched"):
        if isinstance(n := told.get(name), int) and n:
            parts.append(f"{n:,} {name}")
    return ", ".join(parts)


# --- decisions ---


def decisions(facts: Facts) -> Markup:
    lead = "What was changed, by whom, newest first. Each is signed: by the device it happened on, or by an operator."
    if not facts.decisions:
        return chapter("decisions", "Decisions", lead, element("p", "Nothing was changed in the time that is told of."))
    # What devices did in a roll-out as it was planned stands there.
    listed = [one for one in facts.decisions if one.event != "rollout" or _is_noteworthy(one)]
    shown = list(reversed(listed))[:_ROWS]
    kinds = ", ".join(f"{n:,} {event}" for event, n in facts.events.most_common(8))
    happened = ", ".join(f"{n:,} × {event}" for event, n in sorted(facts.happened.items()))
    also = [element("p", f"Besides, devices recorded: {happened}.", kind="muted")] if happened else []
    rest = more(len(facts.decisions) - len(shown), "decisions.jsonl")
    return chapter("decisions", "Decisions", lead, element("p", f"In all: {kinds}."), timeline(shown), *rest, *also)
