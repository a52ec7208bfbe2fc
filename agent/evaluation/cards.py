"""Model card (Mitchell et al. 2019) and data card (Gebru et al. 2021), from an evaluation and the author's words.

What is not known is not there: no empty headings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import msgspec

from agent.evaluation.author import Author
from agent.evaluation.document import Evaluation, Finding
from agent.performance.slices import SMALL, WORSE
from agent.render import html as page
from agent.render.html import Markup, element
from agent.text import figure, interval, metric_name

_MOST_ROWS = 60
_MOST_FIELDS = 16
_MARKDOWN = re.compile(r"([\\`*<>|#]|(?<=\])\()")


class Table(msgspec.Struct, frozen=True):
    """Columns after the first are figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


Part = str | Table


class Card(msgspec.Struct, frozen=True):
    """Headings with what stands under each; one without anything is left out."""

    title: str
    sections: list[tuple[str, list[Part]]] = msgspec.field(default_factory=list)

    def add(self, heading: str, *parts: Part | None) -> None:
        known = [part for part in parts if part and (isinstance(part, str) or part.rows)]
        if known:
            self.sections.append((heading, known))

    def markdown(self) -> str:
        lines = [f"# {_plain(self.title)}", ""]
        for heading, parts in self.sections:
            lines += [f"## {heading}", ""]
            for part in parts:
                lines += [*(_paragraphs(part) if isinstance(part, str) else _rows(part)), ""]
        return "\n".join(lines).rstrip() + "\n"

    def html(self) -> str:
        body: list[Markup] = [element("h1", self.title)]
        for heading, parts in self.sections:
            body.append(element("h2", heading))
            for part in parts:
                body += _markup(part)
        return page.page(self.title, body)


def both(found: Evaluation, author: Author) -> dict[str, Card]:
    """MODEL_CARD and DATA_CARD."""
    return {"MODEL_CARD": model_card(found, author), "DATA_CARD": data_card(found, author)}


def model_card(found: Evaluation, author: Author) -> Card:
    words, model = author.card, found.model
    card = Card(f"Model card: {model.name} {model.version}")
    card.add("Model details", words.about, Table(("", ""), list(_details(found, author))), words.training)
    card.add("Intended use", words.intended_use, _for("Intended users", words.intended_users))
    card.add("Not meant for", words.out_of_scope)
    card.add("Factors", words.factors, _slices(found))
    card.add("Metrics", _told_metrics(found))
    card.add("Evaluation data", _told_data(found))
    card.add("Quantitative analysis", _metrics(found), _classes(found), _against(found))
    card.add("What it depends on", _ablation(found), _robustness(found))
    card.add("Ethical considerations", words.ethics)
    card.add("Caveats and recommendations", words.caveats, *found.warnings, *_small(found))
    card.add("How this card was made", _made(found))
    return card


def data_card(found: Evaluation, author: Author) -> Card:
    words, data = author.data, found.data
    card = Card(f"Data card: what {found.model.name} {found.model.version} was evaluated with")
    card.add("Motivation", words.about, words.motivation, _for("Funded by", words.funded_by))
    files = Table(("File", "Rows"), [[one.file, f"{one.rows:,}"] for one in data.files[:_MOST_ROWS]])
    counts = Table(("Label", "Windows"), [[name, f"{n:,}"] for name, n in list(data.counts.items())[:_MOST_ROWS]])
    splits = Table(("Split", "Windows"), [[name, f"{n:,}"] for name, n in data.splits.items()])
    card.add("Composition", words.instances, _composed(found), files, _fields(found), counts, splits, words.sampling)
    card.add("Quality", *found.notes, _checks([*found.leakage, *found.hints]), _suspects(found))
    when = f"Recorded from {data.begin} to {data.end}." if data.begin and data.end else ""
    card.add("Collection", words.collection, when, _for("Consent", words.consent))
    card.add("Preprocessing and labelling", words.preprocessing, words.labelling)
    card.add("Uses", words.uses, _for("Not for", words.not_for))
    card.add("Distribution", words.distribution, _for("Licence", words.licence))
    card.add("Maintenance", words.maintenance)
    card.add("How this card was made", _made(found))
    return card


def _details(found: Evaluation, author: Author) -> Iterator[list[str]]:
    model, words = found.model, author.card
    unit = dict(zip(model.fields, model.units, strict=False))
    fields = [f"{name} ({unit[name]})" if unit.get(name) else name for name in model.fields]
    if len(fields) > _MOST_FIELDS:
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


def _for(name: str, text: str) -> str:
    return f"{name}: {text}" if text else ""


def _told_metrics(found: Evaluation) -> str:
    return (
        f"The figure that slices, ablation and faults are measured by is {metric_name(found.metric)}. "
        f"Intervals: {found.intervals}."
    )


def _told_data(found: Evaluation) -> str:
    data = found.data
    groups = f", of {data.groups} values of {data.group}" if data.group else ""
    files = ", ".join(one.file for one in data.files[:5]) + (" and more" if len(data.files) > 5 else "")
    return f"{data.windows:,} labelled windows{groups}, from {files}. The data card says more."


def _metrics(found: Evaluation) -> Table:
    rows = [[metric_name(m.metric), figure(m.value), interval(m.low, m.high), f"{m.n:,}"] for m in found.metrics]
    return Table(("Metric", "Value", "95 % interval", "n"), rows)


def _classes(found: Evaluation) -> Table:
    spans = [(c.recall, c.precision, c.f1) for c in found.classes]
    figures = [[f"{figure(s.value)} {interval(s.low, s.high)}".strip() for s in three] for three in spans]
    rows = [[c.label, *told, f"{c.n:,}"] for c, told in zip(found.classes, figures, strict=True)]
    return Table(("Class", "Recall", "Precision", "F1", "n"), rows[:_MOST_ROWS])


def _slices(found: Evaluation) -> Table:
    states = {WORSE: "worse than the rest", SMALL: "too small to tell"}
    rows = [
        [s.slice, figure(s.value), interval(s.low, s.high), f"{s.n:,}", states.get(s.state or "", "")]
        for s in found.slices[:_MOST_ROWS]
    ]
    name = metric_name(found.slices[0].metric) if found.slices else ""
    return Table(("Slice", name, "95 % interval", "n", ""), rows)


def _against(found: Evaluation) -> str:
    if (other := found.against) is None:
        return ""
    change = f"{figure(other.change.value)} {interval(other.change.low, other.change.high)}"
    return f"Beside the float model ({other.bytes:,} bytes), {metric_name(found.metric)} changes by {change}."


def _ablation(found: Evaluation) -> Table:
    rows = [[", ".join(d.fields), figure(d.drop.value), interval(d.drop.low, d.drop.high)] for d in found.ablation]
    return Table(
        ("Field of another window", f"{metric_name(found.metric)}, worse by", "95 % interval"), rows[:_MOST_ROWS]
    )


def _robustness(found: Evaluation) -> Table:
    rows = [
        [f"{fault.fault}: {fault.meaning}", "; ".join(f"{p.strength}: {figure(p.value.value)}" for p in fault.points)]
        for fault in found.robustness
    ]
    return Table(("Fault", f"{metric_name(found.metric)} at each strength"), rows)


def _small(found: Evaluation) -> list[str]:
    small = [one.slice for one in found.slices if one.state == SMALL]
    return [f"Too small to tell: {', '.join(small)}."] if small else []


def _composed(found: Evaluation) -> str:
    data = found.data
    told = [f"{data.rows:,} rows, {data.windows:,} windows with a label (column {data.label})"]
    told += [f"{data.groups} different values of {data.group}"] if data.group else []
    return "; ".join(told) + "."


def _fields(found: Evaluation) -> Table:
    units = found.model.units
    return Table(("Field", "Unit"), [[n, u] for n, u in zip(found.model.fields, units, strict=False)] if units else [])


def _checks(findings: Sequence[Finding]) -> Table:
    told = [[one.check, one.state, one.summary] for one in findings if one.state != "not checked"]
    return Table(("Check", "", "What was found"), told)


def _suspects(found: Evaluation) -> Table:
    rows = [[s.file, f"{s.row:,}", s.label, s.said, figure(s.score)] for s in found.suspects]
    return Table(("Labels to look at", "Row", "Label", "The model says", "Score"), rows)


def _made(found: Evaluation) -> str:
    return f"By `outstation model evaluate` {found.agent} with {found.model.runtime} on {found.made[:10]}."


def _plain(text: str) -> str:
    """Nothing in it is Markdown."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def _paragraphs(text: str) -> list[str]:
    """The author may write paragraphs; what is in them stays as written."""
    return [re.sub(r"[<>]", lambda m: {"<": "&lt;", ">": "&gt;"}[m[0]], text.strip())]


def _rows(part: Table) -> list[str]:
    head = [_plain(name) for name in part.head]
    lines = [head, ["---", *(["---"] * (len(head) - 1))], *([_plain(cell) for cell in row] for row in part.rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _markup(part: Part) -> list[Markup]:
    if isinstance(part, Table):
        return [page.table(list(part.head), [list(row) for row in part.rows])]
    return [element("p", " ".join(text.split())) for text in re.split(r"\n\s*\n", part.strip())]
