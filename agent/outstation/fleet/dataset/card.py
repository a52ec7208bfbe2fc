"""Data card of a retraining set: its content, authors of labels, what was left out, and warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np

from outstation import __version__
from outstation.fleet.dataset import poisoning, sample_labels
from outstation.fleet.dataset.derived import DerivedColumns
from outstation.fleet.dataset.gather import Gathered, Recording, Selection
from outstation.foundation import clock
from outstation.foundation.text import pluralize, printable
from outstation.ml.poisoning.inspect import PoisoningReport
from outstation.ml.poisoning.providers import Provider

# One person gave more of the labels: a thief of that account decides what the model learns.
_MAX_SHARE_OF_ONE = 0.9
_CONFIRMED, _CONFIDENT = "confirmed", 0.9


class OutputCard(msgspec.Struct, frozen=True):
    """Labels of a further output, counted as in the card, and the check of the windows with such a label."""

    labels: dict[str, Any]
    poisoning: PoisoningReport


class DataCard(msgspec.Struct, frozen=True):
    """Counts are of rows, except where a name says samples or labels. Those of `outputs` are of further outputs."""

    selection: Selection
    created: str
    licence: str
    agent: str
    rows: int
    recordings: int
    samples: int
    fields: dict[str, int]
    labels: dict[str, Any]
    by_device: dict[str, dict[str, int]]
    by_day: dict[str, dict[str, int]]
    by_hour: dict[str, int]
    samples_by: dict[str, dict[str, int]]
    left_out_samples: dict[str, int]
    ignored_labels: dict[str, int]
    rows_sent_twice: int
    warnings: list[str]
    poisoning: PoisoningReport
    features: dict[str, Any] | None = None
    inputs: dict[str, dict[str, Any]] = {}
    outputs: dict[str, OutputCard] = {}
    format: str = "outstation-data-card-1"

    @property
    def is_clean(self) -> bool:
        """True if labels of all outputs passed the check for poisoning."""
        return all(report.state == "passed" for _, report in self.list_reports())

    def list_reports(self) -> list[tuple[str, PoisoningReport]]:
        """Return (output, check for poisoning), "" for the first output."""
        return [("", self.poisoning), *((name, each.poisoning) for name, each in self.outputs.items())]

    def to_markdown(self) -> str:
        return "\n".join(_lines(self)) + "\n"


def build(
    gathered: Gathered,
    selection: Selection,
    licence: str,
    created: str,
    derived_columns: DerivedColumns | None = None,
) -> DataCard:
    recordings = gathered.recordings
    members = [sample for recording in recordings for sample in recording.samples]
    label_counts = count_labels(recordings, "")
    outputs = {
        name: OutputCard(count_labels(recordings, name), poisoning.check(gathered, name)) for name in gathered.outputs
    }
    missing = sum((np.isnan(recording.values).sum(axis=0) for recording in recordings), np.zeros(len(gathered.fields)))
    days, hours = _count_times(recordings)
    ignored = {name: n for name, n in gathered.ignored.items() if n}
    return DataCard(
        selection,
        created,
        licence,
        __version__,
        sum(len(recording.t) for recording in recordings),
        len(recordings),
        len(members),
        {name: int(n) for name, n in zip(gathered.fields, missing, strict=True)},
        label_counts,
        _count_by(recordings, lambda recording: recording.device),
        days,
        hours,
        {
            "reason": _count(member["reason"] for member in members),
            "bundle": _count(f"{member['model']} {member['digest']}" for member in members),
            "drift": _count((member["drift"] or {"state": "no drift window yet"})["state"] for member in members),
            "open alerts": _count(alert["alert"] for member in members for alert in member["open_alerts"]),
            "consent": _count(member["consent"] for member in members),
            "digits": _count(str(member["digits"]) for member in members),
        },
        dict(sorted(gathered.left_out.items())),
        ignored,
        gathered.joined_rows,
        _find_warnings({"": label_counts, **{name: each.labels for name, each in outputs.items()}}, gathered, licence),
        poisoning.check(gathered),
        None if derived_columns is None else _describe_features(derived_columns),
        {name: _describe_input(name, fields, recordings) for name, fields in gathered.inputs.items()},
        outputs,
    )


def _describe_input(name: str, fields: list[str], recordings: Iterable[Recording]) -> dict[str, Any]:
    """Return fields, streams and rows of a further input, and the recordings that have none of it."""
    every = [recording.joined.get(name) for recording in recordings]
    known = [rows for rows in every if rows is not None]
    return {
        "fields": fields,
        "streams": sorted({rows.stream for rows in known}),
        "rows": sum(len(rows.t) for rows in known),
        "recordings_without": len(every) - len(known),
    }


def _describe_features(derived_columns: DerivedColumns) -> dict[str, Any]:
    """Return the identity of the feature set, and by column the missing values and those without their history."""
    missing = sum(
        (np.isnan(values).sum(axis=0) for values in derived_columns.values), np.zeros(len(derived_columns.names))
    )
    return {
        **msgspec.to_builtins(derived_columns.feature_set.reference),
        "missing": {name: int(n) for name, n in zip(derived_columns.names, missing, strict=True)},
        "history_left_out": derived_columns.left_out,
    }


def count_labels(recordings: Iterable[Recording], output: str) -> dict[str, Any]:
    """Return how many labels of `output` there are by class, source and person; of numbers, their range."""
    by_class, by_source, by_person = Counter[str](), Counter[str](), Counter[str]()
    problems, rows = Counter[str](), Counter[str]()
    for recording in recordings:
        own = recording.get_output(output)
        for label in own.labels:
            if label.label is None:
                problems[label.problem] += 1
                continue
            by_class[label.label] += 1
            by_source.update(label.sources)
            by_person.update(label.by)
            rows["given more than once"] += label.is_repeated
            result = own.predictions.get(label.row)
            if result is not None and result.label is not None:
                rows["as predicted" if result.label == label.label else "not as predicted"] += 1
                is_bold = result.label != label.label and result.score is not None and result.score >= _CONFIDENT
                rows["against a confident prediction"] += is_bold
    numbers = sample_labels.parse_numbers(by_class)
    return {
        "labelled": sum(by_class.values()),
        "by_class": {} if numbers else dict(sorted(by_class.items())),
        "numbers": {"distinct": len(numbers), "lowest": min(numbers), "highest": max(numbers)} if numbers else {},
        "by_source": dict(sorted(by_source.items())),
        "by_person": dict(sorted(by_person.items())),
        "left_out": dict(sorted(problems.items())),
        **{name.replace(" ", "_"): n for name, n in sorted(rows.items())},
    }


def _count_by(recordings: Iterable[Recording], key: Any) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for recording in recordings:
        entry = counts.setdefault(key(recording), {"rows": 0, "labelled": 0})
        entry["rows"] += len(recording.t)
        entry["labelled"] += sum(label.label is not None for label in recording.get_output("").labels)
    return dict(sorted(counts.items()))


def _count_times(recordings: Iterable[Recording]) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Return rows and labels by day, and rows by hour of the day, UTC."""
    days = _count_by(recordings, lambda recording: clock.to_rfc3339(int(recording.t[0]))[:10])
    hours = Counter[int]()
    for recording in recordings:
        hours.update((recording.t // 3_600_000_000 % 24).tolist())
    return days, {f"{hour:02}": hours[hour] for hour in sorted(hours)}


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _find_warnings(counts_by_output: Mapping[str, Mapping[str, Any]], gathered: Gathered, licence: str) -> list[str]:
    warnings = [
        "Rows were chosen by the model's own alerts and uncertainty, and by what people asked for. They are no random "
        "sample: make no drift reference from them, and do not report accuracy on them as that of all data."
    ]
    if not licence:
        warnings.append("No licence is stated (--licence): nobody may assume that others may use these readings.")
    if not any(counts["labelled"] for counts in counts_by_output.values()):
        warnings.append("No result has a label: give labels or verdicts first.")
    for output, counts in counts_by_output.items():
        head = f"Output {output}: " if output else ""
        warnings += [head + warning for warning in _find_label_warnings(counts)]
    if unreadable := sum(gathered.left_out[name] for name in ("sealed to another key", "broken seal")):
        warnings.append(f"{unreadable} samples are sealed to a key that is not here (folder encryption/).")
    return warnings


def _find_label_warnings(counts: Mapping[str, Any]) -> list[str]:
    labelled, people, warnings = counts["labelled"], counts["by_person"], list[str]()
    if len(counts["by_class"]) == 1:
        warnings.append(f"All labels are {next(iter(counts['by_class']))!r}: a model learns nothing from one class.")
    if disagree := counts["left_out"].get(sample_labels.DISAGREE, 0):
        warnings.append(
            f"{disagree} results have labels that disagree and are left out: look at them, and at who gave them."
        )
    if only_model := counts["left_out"].get(sample_labels.ONLY_MODEL, 0):
        warnings.append(f"{only_model} results are labelled by a model only and are left out.")
    if people and labelled >= 10 and max(people.values()) > _MAX_SHARE_OF_ONE * labelled and len(people) > 1:
        person = max(people, key=lambda name: people[name])
        warnings.append(f"{person} gave {people[person]} of {labelled} labels.")
    if bold := counts.get("against_a_confident_prediction", 0):
        warnings.append(
            f"{bold} labels contradict a prediction with a score of at least {_CONFIDENT:g}: check these first."
        )
    if confirmed := counts["by_source"].get(_CONFIRMED, 0):
        warnings.append(
            f"{confirmed} labels only confirm the model's answer. People who see an answer agree with it more readily."
        )
    return warnings


def _lines(card: DataCard) -> Iterator[str]:
    chosen = card.selection
    yield f"# Data card: {_text(chosen.task)} of fleet {_text(chosen.fleet)}"
    yield ""
    yield (
        f"{card.rows} rows in {card.recordings} recordings, from {card.samples} samples of "
        f"{pluralize(len(card.by_device), 'device')}; "
        f"{card.labels['labelled']} results have a label."
    )
    yield f"Nothing that arrived after {chosen.at} is in it. Made {card.created} by outstation {card.agent}."
    yield f"Licence: {_text(card.licence) or 'not stated'}."
    yield ""
    yield "## Be careful"
    yield ""
    yield from (f"- {_text(warning)}" for warning in card.warnings)
    yield from ("", "## Check for poisoning", "")
    for output, report in card.list_reports():
        head = f"Output {output}: " if output else ""
        yield from (f"- {_text(head + line)}" for line in report.describe())
    if (features := card.features) is not None:
        yield from ("", "## Derived features", "")
        yield f"{_text(features['name'])} {_text(features['version'])}, {features['digest']}. A value is empty where"
        yield "it is missing on the device, too, or where the recording does not hold the rows that it looks back at."
        rows = [(name, n, features["history_left_out"][name]) for name, n in features["missing"].items()]
        yield from _table("Empty features", ("feature", "empty", "without their history"), rows)
    yield from _table(
        "Further inputs",
        ("input", "fields", "streams", "rows", "recordings without"),
        [
            (name, ", ".join(each["fields"]), ", ".join(each["streams"]), each["rows"], each["recordings_without"])
            for name, each in card.inputs.items()
        ],
    )
    tables: list[tuple[str, str, Mapping[str, Any]]] = [
        *_label_tables("Labels", card.labels),
        *(
            table
            for name, each in card.outputs.items()
            for table in _label_tables(f"Labels of output {name}", each.labels)
        ),
        ("Labels and verdicts ignored", "why", card.ignored_labels),
        ("Missing values", "field", card.fields),
        ("Rows by hour of the day, UTC", "hour", card.by_hour),
        ("Samples left out", "why", card.left_out_samples),
        *((f"Samples by {name}", name, values) for name, values in card.samples_by.items()),
    ]
    for title, entries in (("Devices", card.by_device), ("Days, UTC", card.by_day)):
        yield from _table(title, (title.partition(",")[0].lower()[:-1], "rows", "labels"),
                          [(name, entry["rows"], entry["labelled"]) for name, entry in entries.items()])  # fmt: skip
    yield from _table("Labels that contradict those of others", ("who", "windows", "share", "low", "high"), [
        (_name_provider(output, each), each.n, *(f"{share:.1%}" for share in (each.share, each.low, each.high)))
        for output, report in card.list_reports() for each in report.providers
    ])  # fmt: skip
    for title, name, values in tables:
        yield from _table(title, (name, "count"), values.items())
    yield ""
    yield f"{card.rows_sent_twice} rows came in two samples and are here once."


def _label_tables(noun: str, counts: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    numbers = {name: n for name, n in counts.items() if isinstance(n, int) and name != "labelled"}
    return [
        (f"{noun} by class", "class", counts["by_class"]),
        (f"{noun} are numbers", "of them", counts["numbers"]),
        (f"{noun} by source", "source", counts["by_source"]),
        (f"{noun} by person", "given by", counts["by_person"]),
        (f"{noun} left out", "why", counts["left_out"]),
        (f"{noun} compared", "labels", numbers),
    ]


def _name_provider(output: str, provider: Provider) -> str:
    return f"{provider.kind} {provider.name}" + (f", output {output}" if output else "")


def _table(title: str, head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> Iterator[str]:
    lines = [f"| {' | '.join(_text(str(cell)) for cell in row)} |" for row in rows]
    if lines:
        yield from ("", f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines)


def _text(text: str) -> str:
    """Return text of devices and people as Markdown that shows it and does nothing else."""
    shown = printable(text)[:300]
    return "".join(f"\\{char}" if char in "\\`*_{}[]<>()#|!&~$" else char for char in shown)
