"""Model card (Mitchell et al. 2019) and data card (Gebru et al. 2021), from an evaluation and the author's words.

What is not known is not there: no empty headings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import msgspec

from agent.evaluation.author import CardTexts
from agent.evaluation.document import CheckResult, Evaluation
from agent.performance.slices import SMALL, WORSE
from agent.render import html as page
from agent.render.html import Markup, element
from agent.text import format_interval, format_value, metric_name

_MAX_ROWS = 60
_MAX_FIELDS = 16
_MARKDOWN_SPECIAL = re.compile(r"([\\`*<>|#]|(?<=\])\()")


class CardTable(msgspec.Struct, frozen=True):
    """Columns after the first are figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


CardPart = str | CardTable


class EvaluationCard(msgspec.Struct, frozen=True):
    """Headings with what stands under each; one without anything is left out."""

    title: str
    sections: list[tuple[str, list[CardPart]]] = msgspec.field(default_factory=list)

    def add(self, heading: str, *parts: CardPart | None) -> None:
        known = [part for part in parts if part and (isinstance(part, str) or part.rows)]
        if known:
            self.sections.append((heading, known))

    def to_markdown(self) -> str:
        lines = [f"# {_escape_markdown(self.title)}", ""]
        for heading, parts in self.sections:
            lines += [f"## {heading}", ""]
            for part in parts:
                lines += [*(_markdown_paragraphs(part) if isinstance(part, str) else _markdown_table(part)), ""]
        return "\n".join(lines).rstrip() + "\n"

    def to_html(self) -> str:
        body: list[Markup] = [element("h1", self.title)]
        for heading, parts in self.sections:
            body.append(element("h2", heading))
            for part in parts:
                body += _html_elements(part)
        return page.render_document(self.title, body)


def build_cards(evaluation: Evaluation, texts: CardTexts) -> dict[str, EvaluationCard]:
    """MODEL_CARD and DATA_CARD."""
    return {"MODEL_CARD": model_card(evaluation, texts), "DATA_CARD": data_card(evaluation, texts)}


def model_card(evaluation: Evaluation, texts: CardTexts) -> EvaluationCard:
    words, model = texts.card, evaluation.model
    card = EvaluationCard(f"Model card: {model.name} {model.version}")
    card.add("Model details", words.about, CardTable(("", ""), list(_detail_rows(evaluation, texts))), words.training)
    card.add("Intended use", words.intended_use, _labelled_text("Intended users", words.intended_users))
    card.add("Not meant for", words.out_of_scope)
    card.add("Factors", words.factors, _slices_table(evaluation))
    card.add("Metrics", _metrics_text(evaluation))
    card.add("Evaluation data", _data_text(evaluation))
    card.add(
        "Quantitative analysis",
        _metrics_table(evaluation),
        _classes_table(evaluation),
        _float_comparison_text(evaluation),
    )
    card.add("What it depends on", _ablation_table(evaluation), _robustness_table(evaluation))
    card.add("Ethical considerations", words.ethics)
    card.add("Caveats and recommendations", words.caveats, *evaluation.warnings, *_small_slices_text(evaluation))
    card.add("How this card was made", _provenance_text(evaluation))
    return card


def data_card(evaluation: Evaluation, texts: CardTexts) -> EvaluationCard:
    words, data = texts.data, evaluation.data
    card = EvaluationCard(f"Data card: what {evaluation.model.name} {evaluation.model.version} was evaluated with")
    card.add("Motivation", words.about, words.motivation, _labelled_text("Funded by", words.funded_by))
    files = CardTable(("File", "Rows"), [[one.file, f"{one.rows:,}"] for one in data.files[:_MAX_ROWS]])
    counts = CardTable(("Label", "Windows"), [[name, f"{n:,}"] for name, n in list(data.counts.items())[:_MAX_ROWS]])
    splits = CardTable(("Split", "Windows"), [[name, f"{n:,}"] for name, n in data.splits.items()])
    card.add(
        "Composition",
        words.instances,
        _composition_text(evaluation),
        files,
        _fields_table(evaluation),
        counts,
        splits,
        words.sampling,
    )
    card.add(
        "Quality",
        *evaluation.notes,
        _checks_table([*evaluation.leakage, *evaluation.hints]),
        _suspects_table(evaluation),
    )
    when = f"Recorded from {data.begin} to {data.end}." if data.begin and data.end else ""
    card.add("Collection", words.collection, when, _labelled_text("Consent", words.consent))
    card.add("Preprocessing and labelling", words.preprocessing, words.labelling)
    card.add("Uses", words.uses, _labelled_text("Not for", words.not_for))
    card.add("Distribution", words.distribution, _labelled_text("Licence", words.licence))
    card.add("Maintenance", words.maintenance)
    card.add("How this card was made", _provenance_text(evaluation))
    return card


def _detail_rows(evaluation: Evaluation, texts: CardTexts) -> Iterator[list[str]]:
    model, words = evaluation.model, texts.card
    unit = dict(zip(model.fields, model.units, strict=False))
    fields = [f"{name} ({unit[name]})" if unit.get(name) else name for name in model.fields]
    if len(fields) > _MAX_FIELDS:
        fields = [fields[0], "…", f"{fields[-1]}: {len(fields)}"]
    told = {
        "Kind": model.kind,
        "Version": model.version,
        # Not the bundle's own digest or signature: a card that is packed into the bundle changes both.
        "Model": f"{model.bytes:,} bytes, {model.sha256}",
        "Input": f"{model.window[0]} rows, a window every {model.window[1]}" if model.window else "one row",
        "Fields": ", ".join(fields),
        "Labels": ", ".join(model.labels),
        "Threshold": "" if model.threshold is None else f"{model.threshold:g}",
        "Temperature of the scores": "" if model.temperature == 1 else f"{model.temperature:g}",
        "Developed by": words.developed_by,
        "Contact": words.contact,
        "Licence": words.licence,
        "Citation": words.citation,
    }
    return ([name, text] for name, text in told.items() if text)


def _labelled_text(name: str, text: str) -> str:
    return f"{name}: {text}" if text else ""


def _metrics_text(evaluation: Evaluation) -> str:
    return (
        f"The figure that slices, ablation and faults are measured by is {metric_name(evaluation.metric)}. "
        f"Intervals: {evaluation.intervals}."
    )


def _data_text(evaluation: Evaluation) -> str:
    data = evaluation.data
    groups = f", of {data.groups} values of {data.group}" if data.group else ""
    files = ", ".join(one.file for one in data.files[:5]) + (" and more" if len(data.files) > 5 else "")
    return f"{data.windows:,} labelled windows{groups}, from {files}. The data card says more."


def _metrics_table(evaluation: Evaluation) -> CardTable:
    rows = [
        [metric_name(m.metric), format_value(m.value), format_interval(m.low, m.high), f"{m.n:,}"]
        for m in evaluation.metrics
    ]
    return CardTable(("Metric", "Value", "95 % interval", "n"), rows)


def _classes_table(evaluation: Evaluation) -> CardTable:
    spans = [(c.recall, c.precision, c.f1) for c in evaluation.classes]
    figures = [[f"{format_value(s.value)} {format_interval(s.low, s.high)}".strip() for s in three] for three in spans]
    rows = [[c.label, *told, f"{c.n:,}"] for c, told in zip(evaluation.classes, figures, strict=True)]
    return CardTable(("Class", "Recall", "Precision", "F1", "n"), rows[:_MAX_ROWS])


def _slices_table(evaluation: Evaluation) -> CardTable:
    states = {WORSE: "worse than the rest", SMALL: "too small to tell"}
    rows = [
        [s.slice, format_value(s.value), format_interval(s.low, s.high), f"{s.n:,}", states.get(s.state or "", "")]
        for s in evaluation.slices[:_MAX_ROWS]
    ]
    name = metric_name(evaluation.slices[0].metric) if evaluation.slices else ""
    return CardTable(("Slice", name, "95 % interval", "n", ""), rows)


def _float_comparison_text(evaluation: Evaluation) -> str:
    if (other := evaluation.against) is None:
        return ""
    change = f"{format_value(other.change.value)} {format_interval(other.change.low, other.change.high)}"
    return f"Beside the float model ({other.bytes:,} bytes), {metric_name(evaluation.metric)} changes by {change}."


def _ablation_table(evaluation: Evaluation) -> CardTable:
    rows = [
        [", ".join(d.fields), format_value(d.drop.value), format_interval(d.drop.low, d.drop.high)]
        for d in evaluation.ablation
    ]
    return CardTable(
        ("Field of another window", f"{metric_name(evaluation.metric)}, worse by", "95 % interval"), rows[:_MAX_ROWS]
    )


def _robustness_table(evaluation: Evaluation) -> CardTable:
    rows = [
        [
            f"{fault.fault}: {fault.meaning}",
            "; ".join(f"{p.strength}: {format_value(p.value.value)}" for p in fault.points),
        ]
        for fault in evaluation.robustness
    ]
    return CardTable(("Fault", f"{metric_name(evaluation.metric)} at each strength"), rows)


def _small_slices_text(evaluation: Evaluation) -> list[str]:
    small = [one.slice for one in evaluation.slices if one.state == SMALL]
    return [f"Too small to tell: {', '.join(small)}."] if small else []


def _composition_text(evaluation: Evaluation) -> str:
    data = evaluation.data
    told = [f"{data.rows:,} rows, {data.windows:,} windows with a label (column {data.label})"]
    told += [f"{data.groups} different values of {data.group}"] if data.group else []
    return "; ".join(told) + "."


def _fields_table(evaluation: Evaluation) -> CardTable:
    units = evaluation.model.units
    return CardTable(
        ("Field", "Unit"), [[n, u] for n, u in zip(evaluation.model.fields, units, strict=False)] if units else []
    )


def _checks_table(checks: Sequence[CheckResult]) -> CardTable:
    told = [[one.check, one.state, one.summary] for one in checks if one.state != "not checked"]
    return CardTable(("Check", "", "What was found"), told)


def _suspects_table(evaluation: Evaluation) -> CardTable:
    rows = [[s.file, f"{s.row:,}", s.label, s.said, format_value(s.score)] for s in evaluation.suspects]
    return CardTable(("Labels to look at", "Row", "Label", "The model says", "Score"), rows)


def _provenance_text(evaluation: Evaluation) -> str:
    return (
        f"By `outstation model evaluate` {evaluation.agent} with {evaluation.model.runtime} on {evaluation.made[:10]}."
    )


def _escape_markdown(text: str) -> str:
    """Nothing in it is Markdown."""
    return _MARKDOWN_SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _markdown_paragraphs(text: str) -> list[str]:
    """The author may write paragraphs; what is in them stays as written."""
    return [re.sub(r"[<>]", lambda m: {"<": "&lt;", ">": "&gt;"}[m[0]], text.strip())]


def _markdown_table(table: CardTable) -> list[str]:
    head = [_escape_markdown(name) for name in table.head]
    lines = [
        head,
        ["---", *(["---"] * (len(head) - 1))],
        *([_escape_markdown(cell) for cell in row] for row in table.rows),
    ]
    return [f"| {' | '.join(line)} |" for line in lines]


def _html_elements(part: CardPart) -> list[Markup]:
    if isinstance(part, CardTable):
        return [page.table(list(part.head), [list(row) for row in part.rows])]
    return [element("p", " ".join(text.split())) for text in re.split(r"\n\s*\n", part.strip())]
