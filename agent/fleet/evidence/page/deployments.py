"""The page's chapters on what there is: what runs where, and the models with their history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from agent.fleet.evidence.contents import Card, Running
from agent.fleet.evidence.gather.gather import Facts
from agent.fleet.evidence.page.elements import badge, chapter, details, link, more, stacked
from agent.fleet.evidence.page.words import count, few, moment, sentence
from agent.render import html
from agent.render.html import Content, Markup, element, table
from agent.text import figure, interval, metric_name

_ROWS = 25
_DEVICES = 40
_KINDS = {
    "classify": "Names a class",
    "several": "Names any number of classes",
    "regress": "Gives a number",
    "anomaly": "Tells what is unusual",
}


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
        stacked(table(names, per_device), "devices"),
        *more(len(facts.running) - _DEVICES, "running.json"),
    )
    silent = []
    if facts.silent:
        verb = "has" if len(facts.silent) == 1 else "have"
        text = f"{few(facts.silent)} {verb} not told what runs: what runs there is not known."
        silent = [element("p", text, kind="notice")]
    shown = stacked(table(head, rows, (2,)), "running")
    return chapter("running", "What runs where", lead, shown, *silent, listed)


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
    if facts.history:
        parts.append(_history(facts, known))
    if not parts:
        parts.append(element("p", "No model was published here, and none is known to run."))
    return chapter("models", "The models", lead, *parts, *more(len(cards) - _ROWS, "manifest.json", "more bundles"))


def _history(facts: Facts, known: set[str]) -> Markup:
    """Every bundle that devices ever began to run."""
    rows: list[Sequence[Content]] = [
        [
            Markup(f"<b>{escape(str(ran.model))}</b>"),
            moment(ran.first),
            moment(ran.last),
            f"{ran.activations:,}",
            f"{ran.devices:,}",
            f"{ran.running:,}",
            "here" if ran.model.digest in known else badge("not here", "warning"),
        ]
        for ran in facts.history[-_ROWS:]
    ]
    head = ["Model", "First begun", "Last begun", "Times", "Devices", "Running now", "Papers"]
    rest = more(len(facts.history) - _ROWS, "history.json", "older ones")
    shown = stacked(table(head, rows, (3, 4, 5)), "ran")
    return element("div", element("h3", "Every model that ran"), shown, *rest, kind="history")


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
    return element("div", title, *about, html.bullets(facts, "notes"), element("p", joined), digest, kind="card")


def _unchecked(card: Card) -> str:
    if not card.signer:
        return "not signed"
    return f"its signature (key {card.signer[:10]}…) was not checked: that publisher's key was not given"
