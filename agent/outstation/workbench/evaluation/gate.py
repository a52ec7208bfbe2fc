"""Quality gate: requirements that an evaluation must meet before a model ships, for continuous integration.

A requirement is `QUANTITY[.low|.high] OPERATOR NUMBER`, for example `accuracy.low >= 0.9`. A `*` in the quantity stands
for any text: every quantity that matches must meet the requirement.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import msgspec

from outstation.device import config
from outstation.foundation.config import toml_files
from outstation.foundation.errors import ConfigError, UsageError
from outstation.foundation.text import format_interval, format_value
from outstation.ml.comparison.rules import RuleLimits
from outstation.ml.model.bundle.manifest import Manifest
from outstation.ml.performance.estimates import EXPECTED_MAE, EXPECTED_SHARE
from outstation.ml.performance.metrics import METRICS, primary
from outstation.protocol.wire.desired_state import CanaryRules
from outstation.workbench.evaluation.adversarial.results import AdversarialResult
from outstation.workbench.evaluation.context import EvaluationRequest
from outstation.workbench.evaluation.document import BundleComparison, Evaluation, IntervalEstimate, RequirementResult
from outstation.workbench.evaluation.latency import BATCH_SIZES
from outstation.workbench.evaluation.predictions import evaluation_kind

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}
# No quantity ends with a character of an operator: `=>` is not `>` of a quantity that ends with `=`.
_PATTERN = re.compile(
    r"\s*(?P<quantity>\S.*?)(?<![\s=<>!])\s*(?P<operator>>=|<=|==|>|<)\s*(?P<limit>[-+0-9._eE]+)\s*", re.DOTALL
)
_CLASS_METRICS = ("precision", "recall", "f1")
_ADVERSARIAL = ("flipped", "smallest_sd", "median_sd")
_LATENCIES = ("p50_ms", "p95_ms", "per_second", "memory_mib")
_BOUNDS = {".low": "low", ".high": "high"}
_DEFAULTS = CanaryRules()
_OPTIONS = {
    "slice(": "--slice COL measures slices; with --privacy small ones are left out",
    "fault(": "--robustness measures faults",
    "without(": "--ablate measures it",
    "adversarial(": "--adversarial measures it",
    "latency(": f"measured for {', '.join(map(str, BATCH_SIZES))} windows at a time, unless --no-latency is given",
    "float.": "--float MODEL measures it",
}


class Requirement(msgspec.Struct, frozen=True):
    """Limit of one quantity, or of all that its pattern matches; `bound`: value, or an end of the 95 % interval."""

    text: str
    quantity: str
    bound: Literal["value", "low", "high"]
    operator: str
    limit: float

    def matches(self, name: str) -> bool:
        parts = [re.escape(part) for part in self.quantity.split("*")]
        return re.fullmatch(".*".join(parts), name, re.DOTALL) is not None

    def evaluate(self, name: str, estimate: IntervalEstimate) -> RequirementResult:
        """Return the result for a quantity; one without a value, or without the interval asked for, is not met."""
        value = getattr(estimate, self.bound)
        shown = f"{name} is {format_value(estimate.value)} {format_interval(estimate.low, estimate.high)}".strip()
        if value is None:
            missing = "it has no value" if self.bound == "value" else f"it has no interval, so no {self.bound} end"
            return RequirementResult(
                requirement=self.text, subject=name, state="failed", summary=f"{shown}: {missing}."
            )
        is_met = _OPERATORS[self.operator](value, self.limit)
        state: Literal["passed", "failed"] = "passed" if is_met else "failed"
        return RequirementResult(requirement=self.text, subject=name, state=state, summary=f"{shown}.")


class AgainstLimits(RuleLimits, frozen=True, forbid_unknown_fields=True):
    """Limits for `--against`; by default those of a roll-out."""

    max_accuracy_drop: float | None = _DEFAULTS.max_accuracy_drop
    max_error_growth: float | None = _DEFAULTS.max_error_growth


class GateFile(toml_files.Section, frozen=True):
    """File of a gate: `require`, and the limits for `--against` in the table `against`."""

    require: tuple[str, ...] = ()
    against: AgainstLimits = AgainstLimits()


class Gate(msgspec.Struct, frozen=True):
    requirements: tuple[Requirement, ...] = ()
    limits: RuleLimits = AgainstLimits()


def read_gate(given: Sequence[str]) -> Gate:
    """Read requirements, each as an expression or as a file with the ending .toml. Raises UsageError, ConfigError."""
    requirements, limits = [], Gate().limits
    for text in given:
        if not text.endswith(".toml"):
            requirements.append(parse_requirement(text, "--require"))
            continue
        if not Path(text).is_file():
            raise ConfigError(text, "", "no such file; it is the TOML file of --require, with `require = [...]`")
        content = config.read(Path(text), GateFile)
        requirements += [parse_requirement(line, f"{text}: require") for line in content.require]
        limits = content.against
    return Gate(tuple(requirements), limits)


def parse_requirement(text: str, where: str) -> Requirement:
    """Raise UsageError."""
    match = _PATTERN.fullmatch(text)
    try:
        limit = float(match["limit"]) if match else 0.0
    except ValueError:
        match = None
    if match is None:
        raise UsageError(
            f"{where}: {text!r} is no requirement; write a quantity, an operator ({', '.join(_OPERATORS)}) and a "
            'number: "accuracy.low >= 0.9"'
        )
    quantity, bound = match["quantity"], "value"
    for ending, name in _BOUNDS.items():
        if quantity.endswith(ending):
            quantity, bound = quantity.removesuffix(ending), name
    return Requirement(text.strip(), quantity, bound, match["operator"], limit)  # type: ignore[arg-type]


def check_names(gate: Gate, manifest: Manifest, request: EvaluationRequest) -> None:
    """Check before an evaluation that it can have the quantities. Raises UsageError.

    Values of slices, strengths of faults and the like are known only after it.
    """
    kind, labels = manifest.label_kind, manifest.output.labels
    metrics = {metric.name for metric in METRICS if kind in metric.kinds and metric.scope != "device"}
    metrics |= {"coverage", EXPECTED_MAE, EXPECTED_SHARE} if kind == "regress" else set()
    main = primary(evaluation_kind(manifest)).name
    names = {*metrics, "model.bytes", "warnings"}
    names |= {f"class({label}).{metric}" for label in labels for metric in _CLASS_METRICS}
    families = {
        **{f"slice({column}=*).{main}": True for column in request.slices},
        f"fault(*).{main}": request.robustness,
        "without(*).drop": request.ablate,
        **{f"adversarial(*).{ending}": request.adversarial for ending in _ADVERSARIAL},
        **{f"latency({batch}).{name}": request.latency for batch in BATCH_SIZES for name in _LATENCIES},
        **{f"float.{name}": request.float_model is not None for name in ("difference", "agreement")},
    }
    names |= {name for name, is_measured in families.items() if is_measured}
    for requirement in gate.requirements:
        if not any(_may_match(requirement, name) for name in names):
            raise _unknown(requirement, names)


def _may_match(requirement: Requirement, name: str) -> bool:
    """Return True if a requirement may be about a name; one with `*` stands for many."""
    quantity = requirement.quantity
    if "*" in name and "*" in quantity:
        heads = sorted((name.partition("*")[0], quantity.partition("*")[0]), key=len)
        return heads[1].startswith(heads[0])
    is_family = "*" in name and msgspec.structs.replace(requirement, quantity=name).matches(quantity)
    return is_family or requirement.matches(name)


def _unknown(requirement: Requirement, names: Iterable[str]) -> UsageError:
    hint = _hint(requirement.quantity, names)
    problem = f"this evaluation has no quantity {requirement.quantity!r}"
    return UsageError(f"--require {requirement.text!r}: {problem}{hint}")


def check(gate: Gate, evaluation: Evaluation) -> list[RequirementResult]:
    """Return a result for each quantity that a requirement names, and for each rule of the comparison.

    Raises UsageError for a requirement about a quantity that this evaluation does not have.
    """
    quantities = dict(list_quantities(evaluation))
    results = []
    for requirement in gate.requirements:
        named = [name for name in quantities if requirement.matches(name)]
        if not named:
            raise _unknown(requirement, quantities)
        results += [requirement.evaluate(name, quantities[name]) for name in named]
    return results + _rule_results(evaluation.against)


def list_quantities(evaluation: Evaluation) -> Iterator[tuple[str, IntervalEstimate]]:
    """Yield the name and estimate of everything that a requirement can name."""
    metric = evaluation.metric
    for each in evaluation.metrics:
        yield each.metric, IntervalEstimate(value=each.value, low=each.low, high=each.high)
    for label in evaluation.classes:
        yield from ((f"class({label.label}).{name}", getattr(label, name)) for name in _CLASS_METRICS)
    for part in evaluation.slices:
        yield f"slice({part.slice}).{part.metric}", IntervalEstimate(value=part.value, low=part.low, high=part.high)
    for curve in evaluation.robustness:
        yield from ((f"fault({curve.fault}, {point.strength}).{metric}", point.value) for point in curve.points)
    for importance in evaluation.field_importance:
        yield f"without({', '.join(importance.fields)}).drop", importance.metric_drop
    if evaluation.adversarial is not None:
        yield from _list_adversarial(evaluation.adversarial)
    for latency in evaluation.latency:
        for name in _LATENCIES:
            yield f"latency({latency.batch}).{name}", IntervalEstimate(value=getattr(latency, name))
    if (comparison := evaluation.float_comparison) is not None:
        yield "float.difference", comparison.metric_difference
        if comparison.agreement is not None:
            yield "float.agreement", comparison.agreement
    yield "model.bytes", IntervalEstimate(value=float(evaluation.model.bytes))
    yield "warnings", IntervalEstimate(value=float(len(evaluation.warnings)))


def _list_adversarial(result: AdversarialResult) -> Iterator[tuple[str, IntervalEstimate]]:
    for attack in result.attacks:
        for point in attack.points:
            share = IntervalEstimate(value=point.value, low=point.low, high=point.high)
            yield f"adversarial({attack.attack}, {point.strength}).flipped", share
    for change in result.smallest_changes:
        name = f"adversarial({change.field}{', ' if change.label else ''}{change.label})"
        # A change that flips too few answers has no such size: it is beyond any limit.
        if change.smallest_sd is not None or not change.flipped:
            smallest = math.inf if change.smallest_sd is None else change.smallest_sd
            yield f"{name}.smallest_sd", IntervalEstimate(value=smallest)
        yield f"{name}.median_sd", IntervalEstimate(value=math.inf if change.median_sd is None else change.median_sd)


def to_junit(results: Sequence[RequirementResult], name: str) -> str:
    """Return the results as a JUnit XML report, in the form that CI services read."""
    failed = sum(result.state != "passed" for result in results)
    suite = ElementTree.Element("testsuite", name=f"outstation {name}", tests=str(len(results)), failures=str(failed))
    for result in results:
        case = ElementTree.SubElement(suite, "testcase", classname=_xml_text(result.requirement))
        case.set("name", _xml_text(result.subject))
        if result.state != "passed":
            ElementTree.SubElement(case, "failure", message=_xml_text(result.summary), type=result.state)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _rule_results(comparison: BundleComparison | None) -> list[RequirementResult]:
    if comparison is None:
        return []
    against = f"against {comparison.name} {comparison.version}"
    more = " More labelled data would decide it."
    return [
        RequirementResult(
            requirement=against,
            subject=rule.name,
            state=rule.state,
            summary=rule.summary + (more if rule.state == "undecided" else ""),
        )
        for rule in comparison.rules
    ]


def _hint(quantity: str, names: Iterable[str]) -> str:
    for start, option in _OPTIONS.items():
        if quantity.startswith(start):
            return f"; {option}"
    return toml_files.did_you_mean(quantity, {re.sub(r"\(.*\)", "(*)", name) for name in names})


def _xml_text(text: str) -> str:
    """Replace the characters that XML 1.0 does not allow (section 2.2)."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\N{REPLACEMENT CHARACTER}", text)
