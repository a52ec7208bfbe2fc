"""Chapters on deployments: the models on each device, and every bundle with its history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from agent.fleet.evidence.format.contents import BundleCard, RunningTask
from agent.fleet.evidence.gather.gather import EvidenceFacts
from agent.fleet.evidence.page.elements import (
    badge,
    chapter,
    details,
    format_count,
    format_names,
    format_time,
    format_time_range,
    link,
    overflow_link,
    stacked_table,
)
from agent.performance.metrics import display_name
from agent.render import html
from agent.render.html import Content, Markup, element, table
from agent.render.svg import html_text
from agent.text import format_interval, format_value

_MAX_ROWS = 25
_MAX_DEVICES = 40
_KIND_DESCRIPTIONS = {
    "classify": "Predicts one class",
    "several": "Predicts any number of classes",
    "regress": "Predicts a number",
    "anomaly": "Detects anomalies",
}
_DOCUMENT_NAMES = {"MODEL_CARD.md": "model card", "DATA_CARD.md": "data card", "evaluation.json": "evaluation"}


def render_running(facts: EvidenceFacts) -> Markup:
    lead = (
        "The model of each task, as its device last reported and signed it. Start and actor come from the device's "
        "signed record of the change."
    )
    if not facts.running_tasks:
        text = "No device has reported its models yet."
        return chapter("running", "Running models", lead, element("p", text))
    groups: dict[tuple[str, str], list[RunningTask]] = {}
    for task in facts.running_tasks:
        groups.setdefault((task.task, str(task.model) if task.model else ""), []).append(task)
    rows: list[Sequence[Content]] = [_group_row(task, model, tasks) for (task, model), tasks in sorted(groups.items())]
    shown = stacked_table(table(["Task", "Model", "Devices", "Since", "Decided by"], rows, (2,)), "running")
    silent = []
    if facts.silent_devices:
        verb = "has" if len(facts.silent_devices) == 1 else "have"
        text = f"{format_names(facts.silent_devices)} {verb} not reported any models, so theirs are unknown."
        silent = [element("p", text, css_class="notice")]
    return chapter("running", "Running models", lead, shown, *silent, _device_table(facts))


def _device_table(facts: EvidenceFacts) -> Markup:
    rows: list[Sequence[Content]] = [
        [
            task.device,
            task.task,
            str(task.model) if task.model else badge("stopped", "bad"),
            format_time(task.since),
            task.decided_by,
            format_time(task.reported_at),
        ]
        for task in facts.running_tasks[:_MAX_DEVICES]
    ]
    head = ["Device", "Task", "Model", "Since", "Decided by", "Last report"]
    return details(
        f"By device ({len(facts.running_tasks):,})",
        stacked_table(table(head, rows), "devices"),
        *overflow_link(len(facts.running_tasks) - _MAX_DEVICES, "running.json"),
    )


def _group_row(task: str, model: str, running_tasks: Sequence[RunningTask]) -> list[Content]:
    since = [running.since for running in running_tasks if running.since]
    ranked = Counter(running.decided_by for running in running_tasks).most_common()
    actors = [f"{name} ({n:,})" if n < len(running_tasks) else name for name, n in ranked]
    name = model or "none: the task is stopped"
    when = format_time_range(min(since), max(since)) if since else "unknown"
    return [task, Markup(f"<b>{html_text(name)}</b>"), f"{len(running_tasks):,}", when, format_names(actors, 3)]


def render_models(facts: EvidenceFacts) -> Markup:
    lead = (
        "Each bundle holds one model and its documents. A device runs a bundle only if the key of a publisher that it "
        "trusts signed it."
    )
    cards = sorted(facts.bundles.cards, key=lambda card: (-card.running_tasks, card.name, card.created))
    listed_digests = {card.digest for card in cards}
    parts = [element("div", *(_render_card(card) for card in cards[:_MAX_ROWS]), css_class="grid")] if cards else []
    unlisted = sorted(
        {str(task.model) for task in facts.running_tasks if task.model and task.model.digest not in listed_digests}
    )
    if unlisted:
        text = f"Running without documents in this folder: {format_names(unlisted)}. Add them with --bundle."
        parts.append(element("p", text, css_class="notice"))
    if facts.bundles.unreadable:
        text = f"Unreadable bundles: {format_names(facts.bundles.unreadable, 3)}."
        parts.append(element("p", text, css_class="notice"))
    if facts.bundle_history:
        parts.append(_render_history(facts, listed_digests))
    if not parts:
        parts.append(element("p", "No model was published here, and none is known to run."))
    rest = overflow_link(len(cards) - _MAX_ROWS, "manifest.json", "more bundles")
    return chapter("models", "Models", lead, *parts, *rest)


def _render_history(facts: EvidenceFacts, listed_digests: set[str]) -> Markup:
    rows: list[Sequence[Content]] = [
        [
            Markup(f"<b>{html_text(str(usage.model))}</b>"),
            format_time(usage.first),
            format_time(usage.last),
            f"{usage.activations:,}",
            f"{usage.devices:,}",
            f"{usage.running_tasks:,}",
            "here" if usage.model.digest in listed_digests else badge("missing", "warning"),
        ]
        for usage in facts.bundle_history[-_MAX_ROWS:]
    ]
    head = ["Model", "First start", "Last start", "Starts", "Devices", "Running now", "Documents"]
    rest = overflow_link(len(facts.bundle_history) - _MAX_ROWS, "history.json", "older ones")
    shown = stacked_table(table(head, rows, (3, 4, 5)), "ran")
    return element("div", element("h3", "Every model that ran"), shown, *rest, css_class="history")


def _render_card(card: BundleCard) -> Markup:
    usage = f"runs in {format_count(card.running_tasks, 'task')}" if card.running_tasks else "not running"
    kind = _KIND_DESCRIPTIONS.get(card.kind, card.kind)
    notes = [
        f"{kind} from {format_count(len(card.fields), 'input')}; created {card.created[:10]}; {usage}.",
        _signature_text(card),
        _evaluation_text(card),
        *card.warnings[:3],
    ]
    links = [link(f"{card.folder}/{name}", shown) for name, shown in _DOCUMENT_NAMES.items() if name in card.files]
    links.append(link(f"{card.folder}/manifest.json", "manifest"))
    summary = card.summary[:260] + ("…" if len(card.summary) > 260 else "")
    state = badge("in use", "ok") if card.running_tasks else badge("not in use", "none")
    return element(
        "div",
        Markup(f"<h3>{html_text(card.name)} {html_text(card.version)} {state.html}</h3>"),
        *([element("p", summary)] if summary else []),
        html.bullet_list(notes, "notes"),
        element("p", Markup(" · ".join(part.html for part in links))),
        element("p", element("code", card.digest), css_class="muted"),
        css_class="card",
    )


def _signature_text(card: BundleCard) -> str:
    if card.signature_verified:
        return f"Signed by a listed publisher ({card.signer[:10]}…)."
    if not card.signer:
        return "Not signed."
    return f"Signature not verified: the publisher's key ({card.signer[:10]}…) was not given."


def _evaluation_text(card: BundleCard) -> str:
    metrics = [metric for metric in card.metrics if not metric.slice and metric.value is not None][:3]
    if not metrics:
        return "No evaluation was given."
    values = ", ".join(
        f"{display_name(m.metric)} {format_value(m.value)} {format_interval(m.low, m.high)}".strip() for m in metrics
    )
    return f"Evaluated {card.evaluated_at[:10]}: {values} (95 % intervals)."
