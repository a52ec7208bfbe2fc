"""Model card (Mitchell et al. 2019) and data card (Gebru et al. 2021), from an evaluation and the author's texts.

A heading without content is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from agent import config
from agent.errors import ConfigError
from agent.evaluation.document import CheckResult, Evaluation
from agent.evaluation.report import format_estimate
from agent.performance.metrics import display_name
from agent.performance.slices import SMALL, WORSE
from agent.render import html as page
from agent.render.html import Markup, element
from agent.text import format_interval, format_value

_MAX_ROWS = 60
_MAX_FIELDS = 16
_MARKDOWN_SPECIAL = re.compile(r"([\\`*<>|#]|(?<=\])\()")


class ModelCardText(config.Section, frozen=True, kw_only=True):
    """Section [card]: what only the author knows of the model."""

    about: str = ""
    developed_by: str = ""
    contact: str = ""
    licence: str = ""
    citation: str = ""
    intended_use: str = ""
    intended_users: str = ""
    out_of_scope: str = ""
    training: str = ""
    factors: str = ""
    ethics: str = ""
    caveats: str = ""


class DataCardText(config.Section, frozen=True, kw_only=True):
    """Section [data]: what only the author knows of the data."""

    about: str = ""
    motivation: str = ""
    funded_by: str = ""
    instances: str = ""
    sampling: str = ""
    collection: str = ""
    consent: str = ""
    preprocessing: str = ""
    labelling: str = ""
    uses: str = ""
    not_for: str = ""
    distribution: str = ""
    licence: str = ""
    maintenance: str = ""


class CardTexts(config.Section, frozen=True, kw_only=True):
    card: ModelCardText = msgspec.field(default_factory=ModelCardText)
    data: DataCardText = msgspec.field(default_factory=DataCardText)


def read_texts(file: Path) -> CardTexts:
    """Raise ConfigError."""
    if not file.is_file():
        raise ConfigError(str(file), "", "no such file; it is the TOML file with [card] and [data] for the cards")
    return config.read(file, CardTexts)


class CardTable(msgspec.Struct, frozen=True):
    """Table; columns after the first are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


CardPart = str | CardTable


class EvaluationCard(msgspec.Struct, frozen=True):
    title: str
    sections: list[tuple[str, list[CardPart]]] = msgspec.field(default_factory=list)

    def add(self, heading: str, *parts: CardPart | None) -> None:
        """Add a section, if any part has content."""
        filled = [part for part in parts if part and (isinstance(part, str) or part.rows)]
        if filled:
            self.sections.append((heading, filled))

    def to_markdown(self) -> str:
        lines = [f"# {_escape_markdown(self.title)}", ""]
        for heading, parts in self.sections:
            lines += [f"## {heading}", ""]
            for part in parts:
                lines += [*([_markdown_text(part)] if isinstance(part, str) else _markdown_table(part)), ""]
        return "\n".join(lines).rstrip() + "\n"

    def to_html(self) -> str:
        body: list[Markup] = [element("h1", self.title)]
        for heading, parts in self.sections:
            body.append(element("h2", heading))
            for part in parts:
                body += _html_elements(part)
        return page.render_document(self.title, body)


def build_cards(evaluation: Evaluation, texts: CardTexts) -> dict[str, EvaluationCard]:
    """Return the cards by file name, without suffix."""
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
    card.add("Sensitivity", _importance_table(evaluation), _robustness_table(evaluation))
    card.add("Ethical considerations", words.ethics)
    card.add("Caveats and recommendations", words.caveats, *evaluation.warnings, _small_slices_text(evaluation))
    card.add("How this card was made", _provenance_text(evaluation))
    return card


def data_card(evaluation: Evaluation, texts: CardTexts) -> EvaluationCard:
    words, data = texts.data, evaluation.data
    card = EvaluationCard(f"Data card: evaluation data of {evaluation.model.name} {evaluation.model.version}")
    card.add("Motivation", words.about, words.motivation, _labelled_text("Funded by", words.funded_by))
    card.add(
        "Composition",
        words.instances,
        _composition_text(evaluation),
        CardTable(("File", "Rows"), [[source.file, f"{source.rows:,}"] for source in data.files[:_MAX_ROWS]]),
        _fields_table(evaluation),
        _counts_table("Label", data.counts),
        _counts_table("Split", data.splits),
        words.sampling,
    )
    checks = [*evaluation.leakage, *evaluation.label_checks]
    card.add("Quality", *evaluation.notes, _checks_table(checks), _suspects_table(evaluation))
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
    details = {
        "Kind": model.kind,
        "Version": model.version,
        # Not the bundle's digest or signature: a card that is packed into the bundle changes both.
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
    return ([name, text] for name, text in details.items() if text)


def _labelled_text(name: str, text: str) -> str:
    return f"{name}: {text}" if text else ""


def _metrics_text(evaluation: Evaluation) -> str:
    return (
        f"Slices, field importance and faults are measured by {display_name(evaluation.metric)}. "
        f"Intervals: {evaluation.intervals}."
    )


def _data_text(evaluation: Evaluation) -> str:
    data = evaluation.data
    groups = f", of {data.groups} values of {data.group}" if data.group else ""
    files = ", ".join(source.file for source in data.files[:5]) + (" and more" if len(data.files) > 5 else "")
    return f"{data.windows:,} labelled windows{groups}, from {files}. The data card says more."


def _metrics_table(evaluation: Evaluation) -> CardTable:
    rows = [
        [display_name(m.metric), format_value(m.value), format_interval(m.low, m.high), f"{m.n:,}"]
        for m in evaluation.metrics
    ]
    return CardTable(("Metric", "Value", "95 % interval", "n"), rows)


def _classes_table(evaluation: Evaluation) -> CardTable:
    rows = [
        [c.label, *(format_estimate(estimate) for estimate in (c.recall, c.precision, c.f1)), f"{c.n:,}"]
        for c in evaluation.classes[:_MAX_ROWS]
    ]
    return CardTable(("Class", "Recall", "Precision", "F1", "n"), rows)


def _slices_table(evaluation: Evaluation) -> CardTable:
    states = {WORSE: "worse than the rest", SMALL: "too small to tell"}
    rows = [
        [s.slice, format_value(s.value), format_interval(s.low, s.high), f"{s.n:,}", states.get(s.state or "", "")]
        for s in evaluation.slices[:_MAX_ROWS]
    ]
    name = display_name(evaluation.slices[0].metric) if evaluation.slices else ""
    return CardTable(("Slice", name, "95 % interval", "n", ""), rows)


def _float_comparison_text(evaluation: Evaluation) -> str:
    if (other := evaluation.float_comparison) is None:
        return ""
    name, change = display_name(evaluation.metric), format_estimate(other.metric_difference)
    return f"Compared with the float model ({other.bytes:,} bytes), {name} changes by {change}."


def _importance_table(evaluation: Evaluation) -> CardTable:
    head = ("Field of another window", f"{display_name(evaluation.metric)}, worse by", "95 % interval")
    drops = [(", ".join(d.fields), d.metric_drop) for d in evaluation.field_importance[:_MAX_ROWS]]
    return CardTable(head, [[names, format_value(d.value), format_interval(d.low, d.high)] for names, d in drops])


def _robustness_table(evaluation: Evaluation) -> CardTable:
    rows = [
        [
            f"{curve.fault}: {curve.meaning}",
            "; ".join(f"{point.strength}: {format_value(point.value.value)}" for point in curve.points),
        ]
        for curve in evaluation.robustness
    ]
    return CardTable(("Fault", f"{display_name(evaluation.metric)} at each strength"), rows)


def _small_slices_text(evaluation: Evaluation) -> str:
    small = [estimate.slice for estimate in evaluation.slices if estimate.state == SMALL]
    return f"Too small to tell: {', '.join(small)}." if small else ""


def _composition_text(evaluation: Evaluation) -> str:
    data = evaluation.data
    groups = f"; {data.groups} different values of {data.group}" if data.group else ""
    return f"{data.rows:,} rows, {data.windows:,} windows with a label (column {data.label}){groups}."


def _fields_table(evaluation: Evaluation) -> CardTable:
    model = evaluation.model
    rows = [[name, unit] for name, unit in zip(model.fields, model.units, strict=False)] if model.units else []
    return CardTable(("Field", "Unit"), rows)


def _counts_table(name: str, counts: dict[str, int]) -> CardTable:
    return CardTable((name, "Windows"), [[label, f"{n:,}"] for label, n in list(counts.items())[:_MAX_ROWS]])


def _checks_table(checks: Sequence[CheckResult]) -> CardTable:
    rows = [[check.check, check.state, check.summary] for check in checks if check.state != "not checked"]
    return CardTable(("Check", "", "Result"), rows)


def _suspects_table(evaluation: Evaluation) -> CardTable:
    rows = [[s.file, f"{s.row:,}", s.label, s.predicted, format_value(s.score)] for s in evaluation.suspects]
    return CardTable(("Suspect labels", "Row", "Label", "Predicted", "Score"), rows)


def _provenance_text(evaluation: Evaluation) -> str:
    day = evaluation.evaluated_at[:10]
    return f"By `outstation model evaluate` {evaluation.agent} with {evaluation.model.runtime} on {day}."


def _escape_markdown(text: str) -> str:
    return _MARKDOWN_SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _markdown_text(text: str) -> str:
    """Return the author's paragraphs as written, but for HTML."""
    return re.sub(r"[<>]", lambda m: {"<": "&lt;", ">": "&gt;"}[m[0]], text.strip())


def _markdown_table(table: CardTable) -> list[str]:
    head = [_escape_markdown(name) for name in table.head]
    lines = [
        head,
        ["---"] * len(head),
        *([_escape_markdown(cell) for cell in row] for row in table.rows),
    ]
    return [f"| {' | '.join(line)} |" for line in lines]


def _html_elements(part: CardPart) -> list[Markup]:
    if isinstance(part, CardTable):
        return [page.table(list(part.head), [list(row) for row in part.rows])]
    return [element("p", " ".join(text.split())) for text in re.split(r"\n\s*\n", part.strip())]
