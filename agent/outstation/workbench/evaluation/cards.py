"""Model card (Mitchell et al. 2019) and data card (Gebru et al. 2021), from an evaluation and the author's texts.

A heading without content is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from outstation.device import config
from outstation.foundation.errors import ConfigError
from outstation.foundation.render import html as page
from outstation.foundation.render.html import Markup, element
from outstation.ml.performance.metrics import display_name
from outstation.ml.performance.slices import SMALL
from outstation.workbench.evaluation import tables
from outstation.workbench.evaluation.document import Evaluation, name_fields
from outstation.workbench.evaluation.tables import Row, format_estimate, to_texts

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
    rows: Sequence[Row]


CardPart = str | CardTable


class EvaluationCard(msgspec.Struct, frozen=True):
    title: str
    sections: list[tuple[str, list[CardPart]]] = msgspec.field(default_factory=list)

    def add(self, heading: str, *parts: CardPart) -> None:
        """Add a section, if any part has content."""
        filled = [part for part in parts if part and (isinstance(part, str) or part.rows)]
        if filled:
            self.sections.append((heading, filled))

    def to_markdown(self) -> str:
        lines = [f"# {_escape_markdown(self.title)}", ""]
        for heading, parts in self.sections:
            lines += [f"## {heading}", ""]
            for part in parts:
                if isinstance(part, CardTable):
                    lines += [_markdown_table(part), ""]
                else:
                    # As the author wrote it, but for HTML.
                    lines += [part.strip().replace("<", "&lt;").replace(">", "&gt;"), ""]
        return "\n".join(lines).rstrip() + "\n"

    def to_html(self) -> str:
        body: list[Markup] = [element("h1", self.title)]
        for heading, parts in self.sections:
            body.append(element("h2", heading))
            for part in parts:
                if isinstance(part, CardTable):
                    body.append(page.table(part.head, to_texts(part.rows)))
                else:
                    body += [element("p", " ".join(text.split())) for text in re.split(r"\n\s*\n", part.strip())]
        return page.render_document(self.title, body)


# Files of the cards in their folder.
FILES = ("MODEL_CARD.md", "MODEL_CARD.html", "DATA_CARD.md", "DATA_CARD.html")


def build_cards(evaluation: Evaluation, texts: CardTexts) -> dict[str, EvaluationCard]:
    """Return the cards by file name, without suffix."""
    return {"MODEL_CARD": model_card(evaluation, texts.card), "DATA_CARD": data_card(evaluation, texts.data)}


def model_card(evaluation: Evaluation, texts: ModelCardText) -> EvaluationCard:
    model, data, metric = evaluation.model, evaluation.data, display_name(evaluation.metric)
    groups = f", of {data.groups} values of {data.group}" if data.group else ""
    files = ", ".join(source.file for source in data.files[:5]) + (" and more" if len(data.files) > 5 else "")
    slice_metric = display_name(evaluation.slices[0].metric) if evaluation.slices else ""
    slice_rows, importance_rows = tables.slice_rows(evaluation), tables.importance_rows(evaluation)
    faults = [[f"{curve.fault}: {curve.meaning}", tables.format_curve(curve)] for curve in evaluation.robustness]
    comparison = ""
    if (other := evaluation.float_comparison) is not None:
        change = format_estimate(other.metric_difference)
        comparison = f"Compared with the float model ({other.bytes:,} bytes), {metric} changes by {change}."
    small = ", ".join(estimate.slice for estimate in evaluation.slices if estimate.state == SMALL)
    card = EvaluationCard(f"Model card: {model.title}")
    card.add("Model details", texts.about, CardTable(("", ""), _detail_rows(evaluation, texts)), texts.training)
    card.add("Intended use", texts.intended_use, _labelled_text("Intended users", texts.intended_users))
    card.add("Not meant for", texts.out_of_scope)
    card.add(
        "Factors", texts.factors, CardTable(("Slice", slice_metric, "95 % interval", "n", ""), slice_rows[:_MAX_ROWS])
    )
    card.add(
        "Metrics", f"Slices, field importance and faults are measured by {metric}. Intervals: {evaluation.intervals}."
    )
    card.add("Evaluation data", f"{data.windows:,} labelled windows{groups}, from {files}. The data card says more.")
    card.add(
        "Quantitative analysis",
        CardTable(("Metric", "Value", "95 % interval", "n"), tables.metric_rows(evaluation)),
        CardTable(("Class", "Recall", "Precision", "F1", "n"), tables.class_rows(evaluation)[:_MAX_ROWS]),
        comparison,
    )
    card.add(
        "Sensitivity",
        CardTable(("Field of another window", f"{metric}, worse by", "95 % interval"), importance_rows[:_MAX_ROWS]),
        CardTable(("Fault", f"{metric} at each strength"), faults),
        CardTable(("Attack on the input", "Flipped answers at each strength"), tables.attack_rows(evaluation)),
    )
    card.add("Ethical considerations", texts.ethics)
    too_small = f"Too small to tell: {small}." if small else ""
    card.add("Caveats and recommendations", texts.caveats, *evaluation.warnings, too_small)
    card.add("How this card was made", _provenance_text(evaluation))
    return card


def data_card(evaluation: Evaluation, texts: DataCardText) -> EvaluationCard:
    model, data = evaluation.model, evaluation.data
    groups = f"; {data.groups} different values of {data.group}" if data.group else ""
    checks = [check for check in (*evaluation.leakage, *evaluation.label_checks) if check.state != "not checked"]
    when = f"Recorded from {data.begin} to {data.end}." if data.begin and data.end else ""
    card = EvaluationCard(f"Data card: evaluation data of {model.title}")
    card.add("Motivation", texts.about, texts.motivation, _labelled_text("Funded by", texts.funded_by))
    card.add(
        "Composition",
        texts.instances,
        f"{data.rows:,} rows, {data.windows:,} windows with a label (column {data.label}){groups}.",
        CardTable(("File", "Rows"), [(source.file, source.rows) for source in data.files[:_MAX_ROWS]]),
        CardTable(("Field", "Unit"), list(zip(model.fields, model.units, strict=False))),
        CardTable(("Joined input", "Fields"), [(name, ", ".join(fields)) for name, fields in model.inputs.items()]),
        CardTable(("Label", "Windows"), list(data.counts.items())[:_MAX_ROWS]),
        CardTable(("Split", "Windows"), list(data.splits.items())[:_MAX_ROWS]),
        texts.sampling,
    )
    card.add(
        "Quality",
        *evaluation.notes,
        CardTable(("Check", "", "Result"), [(check.check, check.state, check.summary) for check in checks]),
        CardTable(("Suspect labels", "Row", "Label", "Predicted", "Score"), tables.suspect_rows(evaluation)),
    )
    card.add("Collection", texts.collection, when, _labelled_text("Consent", texts.consent))
    card.add("Preprocessing and labelling", texts.preprocessing, texts.labelling)
    card.add("Uses", texts.uses, _labelled_text("Not for", texts.not_for))
    card.add("Distribution", texts.distribution, _labelled_text("Licence", texts.licence))
    card.add("Maintenance", texts.maintenance)
    card.add("How this card was made", _provenance_text(evaluation))
    return card


def _detail_rows(evaluation: Evaluation, texts: ModelCardText) -> list[Row]:
    model = evaluation.model
    joined = [f"{name}: {_list_fields(fields)}" for name, fields in model.inputs.items()]
    details = {
        "Kind": model.kind,
        "Version": model.version,
        # Not the bundle's digest or signature: a card that is packed into the bundle changes both.
        "Model": f"{model.bytes:,} bytes, {model.sha256}",
        "Input": f"{model.window[0]} rows, a window every {model.window[1]}" if model.window else "one row",
        "Fields": _list_fields(name_fields(model.fields, model.units)),
        "Joined inputs": "; ".join(joined),
        "Labels": ", ".join(model.labels),
        "Further outputs": ", ".join(f"{name} ({kind})" for name, kind in model.outputs.items()),
        "Threshold": "" if model.threshold is None else f"{model.threshold:g}",
        "Temperature of the scores": "" if model.temperature == 1 else f"{model.temperature:g}",
        "Developed by": texts.developed_by,
        "Contact": texts.contact,
        "Licence": texts.licence,
        "Citation": texts.citation,
    }
    return [(name, text) for name, text in details.items() if text]


def _list_fields(fields: list[str]) -> str:
    shown = fields if len(fields) <= _MAX_FIELDS else [fields[0], "…", f"{fields[-1]}: {len(fields)}"]
    return ", ".join(shown)


def _labelled_text(name: str, text: str) -> str:
    return f"{name}: {text}" if text else ""


def _provenance_text(evaluation: Evaluation) -> str:
    day = evaluation.evaluated_at[:10]
    return f"By `outstation model evaluate` {evaluation.agent} with {evaluation.model.runtime} on {day}."


def _escape_markdown(text: str) -> str:
    return _MARKDOWN_SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _markdown_table(table: CardTable) -> str:
    head, *rows = ([_escape_markdown(cell) for cell in row] for row in [table.head, *to_texts(table.rows)])
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])
