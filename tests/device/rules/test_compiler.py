"""Compiled alert rules: a rule that the bundle's output can never satisfy, or that never clears, is refused."""

from __future__ import annotations

from typing import Any

import pytest

from outstation.device.config.alert_rules import AlertRuleConfig
from outstation.device.rules import compiler, sentences
from outstation.foundation.config.quantities import Duration
from outstation.foundation.errors import ConfigError
from outstation.ml.model.activation import LoadedBundle
from outstation.ml.model.bundle.manifest import IsotonicCalibration, Manifest, ModelOutput
from scripts.kit.bundles import ANOMALY, CLASSIFY, FLOAT, REGRESS, SEVERAL, VECTORS, activated

BUNDLES = {
    "classify": CLASSIFY,
    "float": FLOAT,
    "several": SEVERAL,
    "regress": REGRESS,
    "anomaly": ANOMALY,
    "embedding": VECTORS,
}


def compile_for(bundle: LoadedBundle, **rule: Any) -> compiler.CompiledRule:
    return compiler.compile_rule(
        "device.toml", "tiny", 2, AlertRuleConfig(name="x", **rule), bundle.bundle.manifest, bundle.model
    )


@pytest.mark.parametrize(
    ("kind", "rule", "member", "problem"),
    [
        ("classify", {"label": "lefd"}, "label", "has no class 'lefd'; did you mean 'left'?"),
        ("classify", {"labels": ["left", "up"]}, "labels", "has no class 'up'"),
        ("classify", {"labels": ["left", "right", "rest"]}, "labels", "every class"),
        ("classify", {"label": "left", "score": "> 1"}, "score", "can never fire: every score"),
        (
            "classify",
            {"label": "left", "score": "< 0.3"},
            "score",
            "can never fire: every score of this bundle is from 0.333",
        ),
        ("classify", {"score": ">= 0.2"}, "score", "always holds"),
        ("classify", {"score": ">= 0.9", "clear": "< 0.2"}, "clear", "never holds"),
        ("classify", {"value": "> 1"}, "value", "is a classifier"),
        ("classify", {"anomaly": True}, "anomaly", "is a classifier"),
        ("classify", {"label": "left", "summary": "{value}"}, "summary", "gives no {value}"),
        ("regress", {"label": "left"}, "label", "names no class"),
        ("regress", {"score": "> 0.5"}, "score", "gives no score"),
        ("regress", {"anomaly": True}, "anomaly", "names no class"),
        ("regress", {"value": "> 1e6"}, "value", "can never fire: every value"),
        ("regress", {"value": "< 1e6"}, "value", "always holds"),
        ("regress", {"value": "> 0", "output": "second"}, "output", "has no value 'second'"),
        ("regress", {"value": "> 0", "summary": "{label}"}, "summary", "gives no {label}"),
        ("anomaly", {"value": "< 0"}, "value", "can never fire: every value of this bundle is 0 or more"),
        ("anomaly", {"value": ">= 0"}, "value", "always holds"),
        ("anomaly", {"value": "> 2", "clear": "< 0"}, "clear", "never holds"),
        ("anomaly", {"label": "left"}, "label", "has no class 'left'; there is anomaly, normal"),
        ("anomaly", {"score": "> 0.5"}, "score", "gives no score"),
        ("embedding", {"anomaly": True}, "anomaly", "makes embeddings"),
        ("embedding", {"value": "> 0.5"}, "value", "makes embeddings"),
        ("embedding", {"unchanged": "2 h"}, "unchanged", "makes embeddings"),
        ("several", {"label": "warm", "score": "> 1"}, "score", "can never fire"),
    ],
)
def test_a_rule_that_can_never_fire_or_never_clear_is_an_error(
    kind: str, rule: dict[str, Any], member: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        compile_for(activated(BUNDLES[kind]), **rule)
    assert str(refused.value).startswith(f"device.toml: tasks.tiny.alerts[2].{member}: ")
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("classify", {"label": "left", "score": ">= 1"}),
        ("classify", {"score": "< 0.5"}),
        ("classify", {"unchanged": "2 h"}),
        ("several", {"labels": ["warm", "damp", "loud"]}),
        ("several", {"label": "warm", "score": "< 0.1"}),
        ("regress", {"value": "> 0", "clear": "< -0.5", "summary": "{value}"}),
        ("regress", {"unchanged": "20 windows"}),
        ("anomaly", {"anomaly": True, "summary": "{label} {value}"}),
        ("anomaly", {"label": "normal"}),
        ("anomaly", {"value": "> 80"}),
    ],
)
def test_a_rule_that_can_fire_is_bound(kind: str, rule: dict[str, Any]) -> None:
    assert compile_for(activated(BUNDLES[kind]), **rule).name == "x"


def with_output(output: ModelOutput, kind: str = "classify") -> Manifest:
    manifest: Manifest = activated(CLASSIFY).bundle.manifest
    members = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    return Manifest(**members | {"output": output, "kind": kind})


@pytest.mark.parametrize(
    ("output", "kind", "rule", "problem"),
    [
        (ModelOutput(labels=["a", "b"], threshold=0.8), "classify", {"label": "b", "score": "< 0.7"}, "never fire"),
        (ModelOutput(labels=["a", "b"], threshold=0.8), "classify", {"label": "a", "score": "< 0.1"}, "never fire"),
        (ModelOutput(labels=["a", "b"], threshold=1.0), "classify", {"label": "b"}, "never fire"),
        (ModelOutput(labels=["a"], multi_label=True, thresholds=[1.0]), "classify", {"label": "a"}, "never fire"),
        (
            ModelOutput(labels=["a", "b"], isotonic=IsotonicCalibration(score=[0.0, 1.0], accuracy=[0.4, 0.9])),
            *("classify", {"score": "> 0.95"}, "from 0.4 to 0.9"),
        ),
        (ModelOutput(), "anomaly", {"anomaly": True}, "no output.threshold"),
        (ModelOutput(), "anomaly", {"label": "anomaly"}, "no output.threshold"),
        (ModelOutput(labels=[f"l{i}" for i in range(20)], multi_label=True), "classify", {"unchanged": "2 h"}, "16"),
    ],
)
def test_thresholds_and_calibration_of_the_bundle_limit_what_can_fire(
    output: ModelOutput, kind: str, rule: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        compiler.compile_rule("f", "t", 0, AlertRuleConfig(name="x", **rule), with_output(output, kind))


def test_the_range_of_a_second_value_and_its_name_are_checked() -> None:
    manifest = with_output(ModelOutput(names=["flow", "heat"]), "regress")
    rule = compiler.compile_rule("f", "t", 0, AlertRuleConfig(name="x", value="> 5", output="heat"), manifest)
    assert rule.columns == ("value_heat",)
    first = compiler.compile_rule("f", "t", 0, AlertRuleConfig(name="x", value="> 5", output="flow"), manifest)
    assert first.columns == ()


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ({"label": "left"}, "warning when a result has label 'left'; clears when a result has no label 'left'"),
        (
            {"labels": ["left", "rest"], "for_": "3 of 5", "severity": "critical", "hold": Duration(600.0)},
            "critical when 3 of the last 5 results have label 'left' or 'rest'; clears when 5 results in a row have no "
            "label 'left' or 'rest', at least 10 min after it was raised",
        ),
        (
            {"value": "> 80", "clear": "< 75", "for_": "2 h", "only_healthy": True},
            "warning when results have value > 80 for 2 h; clears when results have value < 75 for 2 h; a result "
            "counts when its drift window closes, never with a sensor fault or too much missing input",
        ),
        (
            {"label": "left", "score": ">= 0.9", "clear": "< 0.5"},
            "warning when a result has label 'left' with score >= 0.9; clears when a result has no label 'left', or "
            "score < 0.5",
        ),
        (
            {"unchanged": "2 h"},
            "warning when the answer has not changed for 2 h; clears when the answer has changed",
        ),
    ],
)
def test_a_rule_is_explained_in_a_sentence(rule: dict[str, Any], sentence: str) -> None:
    assert sentences.explain(AlertRuleConfig(name="x", **rule)) == sentence
