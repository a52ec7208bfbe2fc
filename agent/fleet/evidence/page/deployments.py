"""The page's chapters on what there is: what runs where, and the models with their history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from agent.fleet.evidence.format.contents import BundleCard, RunningTask
from agent.fleet.evidence.gather.gather import EvidenceFacts
from agent.fleet.evidence.page.elements import (
    badge,
    capitalize,
    chapter,
    details,
    format_count,
    format_names,
    format_time,
    link,
    overflow_link,
    stacked_table,
)
from agent.performance.metrics import display_name
from agent.render import html
from agent.render.html import Content, Markup, element, table
from agent.text import format_interval, format_value

_MAX_ROWS = 25
_MAX_DEVICES = 40
_KIND_DESCRIPTIONS = {
    "classify": "Names a class",
    "several": "Names any number of classes",
    "regress": "Gives a number",
    "anomaly": "Tells what is unusual",
}


def render_running(facts: EvidenceFacts) -> Markup:
    lead = (
        "What each device last said it runs, signed by the device. Since when and by whom: from its signed record of "
        "the change."
    )
    if not facts.running_tasks:
        return chapter("running", "What runs where", lead, element("p", "No device has told yet what it runs."))
    groups: dict[tuple[str, str], list[RunningTask]] = {}
    for one in facts.running_tasks:
        groups.setdefault((one.task, str(one.model) if one.model else ""), []).append(one)
    rows: list[Sequence[Content]] = [_group_row(task, model, those) for (task, model), those in sorted(groups.items())]
    head = ["Task", "Model", "Devices", "Since", "Decided by"]
    per_device: list[Sequence[Content]] = [
        [
            one.device,
            one.task,
            _model_cell(one),
            format_time(one.since) if one.since else "not told",
            one.who,
            format_time(one.told),
        ]
        for one in facts.running_tasks[:_MAX_DEVICES]
    ]
    names = ["Device", "Task", "Model", "Since", "Decided by", "Last told"]
    listed = details(
        f"Device by device ({len(facts.running_tasks):,})",
        stacked_table(table(names, per_device), "devices"),
        *overflow_link(len(facts.running_tasks) - _MAX_DEVICES, "running.json"),
    )
    silent = []
    if facts.silent_devices:
        verb = "has" if len(facts.silent_devices) == 1 else "have"
        text = f"{format_names(facts.silent_devices)} {verb} not told what runs: what runs there is not known."
        silent = [element("p", text, css_class="notice")]
    shown = stacked_table(table(head, rows, (2,)), "running")
    return chapter("running", "What runs where", lead, shown, *silent, listed)


def _group_row(task: str, model: str, running_tasks: Sequence[RunningTask]) -> list[Content]:
    since = sorted(one.since for one in running_tasks if one.since)
    when = format_time(since[0]) if since else "not told"
    if since and since[0][:16] != since[-1][:16]:
        when = f"{format_time(since[0])} to {format_time(since[-1])}"
    ranked = Counter(one.who for one in running_tasks).most_common()
    deciders = [f"{name} ({n:,})" if n < len(running_tasks) else name for name, n in ranked]
    name = model or "none: the task does not run"
    return [task, Markup(f"<b>{escape(name)}</b>"), f"{len(running_tasks):,}", when, format_names(deciders, 3)]


def _model_cell(running_task: RunningTask) -> Content:
    return str(running_task.model) if running_task.model else badge("does not run", "bad")


def render_models(facts: EvidenceFacts) -> Markup:
    lead = (
        "Each bundle holds one model with its papers. A device runs none unless its signature fits a "
        "publisher's key that it knows."
    )
    cards = sorted(facts.bundles.cards, key=lambda card: (-card.devices, card.name, card.created))
    known = {card.digest for card in cards}
    parts = [element("div", *(_render_card(card) for card in cards[:_MAX_ROWS]), css_class="grid")] if cards else []
    unknown = sorted({str(o.model) for o in facts.running_tasks if o.model and o.model.digest not in known})
    if unknown:
        text = (
            f"Runs in the fleet, but its papers were not found here: {format_names(unknown)}. Add them with --bundle."
        )
        parts.append(element("p", text, css_class="notice"))
    if facts.bundles.unreadable:
        parts.append(
            element("p", f"Could not be read: {format_names(facts.bundles.unreadable, 3)}.", css_class="notice")
        )
    if facts.bundle_history:
        parts.append(_render_history(facts, known))
    if not parts:
        parts.append(element("p", "No model was published here, and none is known to run."))
    return chapter(
        "models", "The models", lead, *parts, *overflow_link(len(cards) - _MAX_ROWS, "manifest.json", "more bundles")
    )


def _render_history(facts: EvidenceFacts, listed_digests: set[str]) -> Markup:
    """Every bundle that devices ever began to run."""
    rows: list[Sequence[Content]] = [
        [
            Markup(f"<b>{escape(str(ran.model))}</b>"),
            format_time(ran.first),
            format_time(ran.last),
            f"{ran.activations:,}",
            f"{ran.devices:,}",
            f"{ran.running:,}",
            "here" if ran.model.digest in listed_digests else badge("not here", "warning"),
        ]
        for ran in facts.bundle_history[-_MAX_ROWS:]
    ]
    head = ["Model", "First begun", "Last begun", "Times", "Devices", "Running now", "Papers"]
    rest = overflow_link(len(facts.bundle_history) - _MAX_ROWS, "history.json", "older ones")
    shown = stacked_table(table(head, rows, (3, 4, 5)), "ran")
    return element("div", element("h3", "Every model that ran"), shown, *rest, css_class="history")


def _render_card(card: BundleCard) -> Markup:
    runs = f"runs for {format_count(card.devices, 'task')}" if card.devices else "does not run now"
    signed = f"signed by a listed publisher ({card.signer[:10]}…)" if card.checked else _unchecked_text(card)
    does = f"{_KIND_DESCRIPTIONS.get(card.kind, card.kind)}, from {format_count(len(card.fields), 'input')}"
    facts = [
        f"{does}; made {card.created[:10]}; {runs}.",
        f"{capitalize(signed)}.",
    ]
    metrics = [one for one in card.metrics if not one.slice and one.value is not None][:3]
    if metrics:
        told = ", ".join(
            f"{display_name(m.metric)} {format_value(m.value)} {format_interval(m.low, m.high)}".strip()
            for m in metrics
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
    digest = element("p", element("code", card.digest), css_class="muted")
    return element(
        "div", title, *about, html.bullet_list(facts, "notes"), element("p", joined), digest, css_class="card"
    )


def _unchecked_text(card: BundleCard) -> str:
    if not card.signer:
        return "not signed"
    return f"its signature (key {card.signer[:10]}…) was not checked: that publisher's key was not given"
