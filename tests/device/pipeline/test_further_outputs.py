"""Further outputs on a device: their drift, and alert rules about them, from pack to the signed message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.device.config.alert_rules import AlertRuleConfig
from outstation.device.rules import compiler, sentences
from outstation.device.rules.batch_results import BatchResults, PendingResults
from outstation.foundation.errors import ConfigError
from outstation.ml.drift.reporting import parsed_message
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference import runtime, scores
from outstation.ml.model.inference.inference import Inference
from outstation.ml.model.inference.joins import JoinedRows
from outstation.protocol.wire.messages import AlertPayload, DriftPayload
from outstation.workbench.authoring import pack
from outstation.workbench.cli.model.group import model
from scripts.kit.bundles import KEY, WINDOWED, waves, write_csv, write_joined_spec
from tests.kit import multi_output_device
from tests.kit.devices import Device
from tests.kit.multi_output_device import AIR_STEP_US, feed, still_air

RULES = [
    AlertRuleConfig(name="wear", output="wear", value="> 1e9"),
    AlertRuleConfig(name="worn", output="wear", value="> -1e9", clear="< -2e9"),
    AlertRuleConfig(name="wet", output="flags", label="wet", score="> 0.0001", only_healthy=True),
    AlertRuleConfig(name="same", output="flags", unchanged="3 windows"),
]


@pytest.fixture
def device(tmp_path: Path, packed: Bundle) -> Iterator[Device]:
    made = multi_output_device.make_device(tmp_path / "store", packed, RULES)
    yield made
    made.store.close()


def restless_air(count: int, seed: int) -> NDArray[np.float32]:
    """Air that goes up and down: wear, its last value less its first, is far from 0, and the mean of three is 0."""
    return np.resize(np.array([-4, 0, 4], "<f4"), count)


def raised(device: Device, kind: str) -> list[AlertPayload]:
    bodies = [message.body for message in device.messages()]
    return [b for b in bodies if isinstance(b, AlertPayload) and (b.alert, b.state) == (kind, "raised")]


def test_a_joined_stream_that_drifts_shows_in_the_output_that_depends_on_it(device: Device) -> None:
    for seed in range(6):
        feed(device, seed, 800, still_air)
    assert raised(device, "drift") == []
    device.restart()
    for seed in range(6, 10):
        feed(device, seed, 800, restless_air)
    subjects = {alert.subject for alert in raised(device, "drift")}
    assert "output.wear" in subjects
    assert not subjects & {*WINDOWED, "output.flags"}
    drift = [message.body for message in device.messages() if isinstance(message.body, DriftPayload)]
    assert set(drift[-1].output["further"]) == {"flags", "wear"}
    assert drift[-1].output["further"]["wear"]["values"].keys() == {"wear"}
    assert sum(drift[-1].output["further"]["flags"]["counts"].values()) >= 10
    assert parsed_message.from_message(
        {"features": drift[-1].features, "output": drift[-1].output, "state": drift[-1].state}, (0, 1)
    ).subjects.keys() >= {"output.flags", "output.wear"}


def test_rules_about_further_outputs_raise_results_that_name_them(device: Device) -> None:
    feed(device, 1, 800, still_air)
    by_rule = {alert.subject: alert for alert in raised(device, "result")}
    assert "wear" not in by_rule
    assert by_rule["worn"].evidence["output"] == "wear"
    assert "value" in by_rule["worn"].evidence
    assert by_rule["wet"].evidence["output"] == "flags"
    assert by_rule["wet"].evidence["label"] in ("hot", "wet", "hot|wet", "-")
    assert "flags" in by_rule["wet"].summary


def test_results_that_wait_for_their_drift_window_keep_further_outputs(packed: Bundle) -> None:
    inference = Inference(packed.manifest, runtime.load_model(packed.manifest, packed.model_bytes))
    weather = JoinedRows(waves(30)[:, :1], np.arange(30) * AIR_STEP_US)
    result = inference.run(waves(200), np.arange(200) * 10_000, joined={"weather": weather})
    ends = result.cut.starts
    before = BatchResults(result.scores, None, ends, ends, np.ones(len(ends), np.bool_))
    waiting = PendingResults.pack(before, "sha256:a")
    after = waiting.unpack("sha256:a", result.scores.outputs)
    assert after is not None
    assert waiting.unpack("sha256:b", result.scores.outputs) is None
    old = PendingResults.pack(replace(before, scores=replace(result.scores, outputs={})), "sha256:a")
    assert old.unpack("sha256:a", result.scores.outputs) is None, "an earlier version stored them"
    for rule in RULES:
        bound = compiler.compile_rule("device.toml", "tiny", 0, rule, packed.manifest)
        assert bound.find_answered(after.scores).tolist() == bound.find_answered(before.scores).tolist()
        assert bound.label(after, 3) == bound.label(before, 3)
        if rule.unchanged is None:
            assert bound.observe(after.scores)[0].tolist() == bound.observe(before.scores)[0].tolist()


@pytest.mark.parametrize(
    ("rule", "member", "why"),
    [
        ({"output": "flag", "label": "wet"}, "output", "no further output 'flag'; did you mean 'flags'"),
        ({"output": "flags", "label": "cold"}, "label", "has no class 'cold'"),
        ({"output": "flags", "value": "> 1"}, "value", "is a classifier"),
        ({"output": "wear", "label": "wet"}, "label", "names no class"),
        ({"output": "wear.left", "value": "> 1"}, "value", "is a classifier"),
        ({"output": "flags", "label": "wet", "score": "> 1"}, "score", "can never fire"),
    ],
)
def test_a_rule_that_a_further_output_can_never_satisfy_is_refused(
    packed: Bundle, rule: dict[str, Any], member: str, why: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        compiler.compile_rule("device.toml", "tiny", 0, AlertRuleConfig(name="x", **rule), packed.manifest)
    assert f"[0].{member}" in str(caught.value)
    assert why in str(caught.value)


def test_a_rule_is_explained_with_its_output() -> None:
    assert "flags label 'wet'" in sentences.explain(RULES[2])
    assert "value wear > 1e9" in sentences.explain(RULES[0])


def test_a_model_of_one_output_gives_the_bits_of_the_model_of_several(packed: Bundle) -> None:
    weather, rows = waves(60, seed=2)[:, :1], waves(400, seed=6)
    view = scores.further_manifest(packed.manifest, "wear")
    inference = Inference(view, runtime.load_model(view, packed.model_bytes))
    whole = Inference(packed.manifest, runtime.load_model(packed.manifest, packed.model_bytes))
    t = np.arange(len(rows)) * 10_000
    joined = {"weather": JoinedRows(weather, np.arange(60) * AIR_STEP_US)}
    alone, all_of = (each.run(rows, t, joined=joined).scores for each in (inference, whole))
    assert alone.value is not None
    assert alone.value.tolist() == all_of.extra_columns["value_wear"].tolist()


def test_evaluate_judges_a_further_output_by_the_labels_of_its_name(tmp_path: Path, packed: Bundle) -> None:
    for name, content in packed.files.items():
        (tmp_path / "bundle").mkdir(exist_ok=True)
        (tmp_path / "bundle" / name).write_bytes(content)
    weather, rows = still_air(30, 2)[:, None], waves(400, seed=6)
    inference = Inference(packed.manifest, runtime.load_model(packed.manifest, packed.model_bytes))
    joined = {"weather": JoinedRows(weather, np.arange(30) * AIR_STEP_US)}
    result = inference.run(rows, np.arange(400) * 10_000, joined=joined)
    labels = dict(zip((result.cut.starts + 7).tolist(), result.scores.extra_columns["value_wear"] + 0.5, strict=True))
    lines = write_csv(tmp_path / "rows.csv", WINDOWED, rows).read_text().splitlines()
    labelled = [f"{lines[0]},label_wear", *(f"{line},{labels.get(i, '')}" for i, line in enumerate(lines[1:]))]
    (tmp_path / "rows.csv").write_text("\n".join(labelled) + "\n")
    air = write_csv(tmp_path / "weather.csv", ("air",), weather, step_s=0.31)
    command = ["evaluate", str(tmp_path / "bundle"), str(tmp_path / "rows.csv"), "--join", f"weather={air}"]
    done = CliRunner().invoke(model, [*command, "--output", "wear", "--no-latency", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["model"]["output"] == "wear"
    assert {metric["metric"]: metric["value"] for metric in document["metrics"]}["mae"] == pytest.approx(0.5, abs=0.01)
    unknown = CliRunner().invoke(model, [*command, "--output", "wera"])
    assert "did you mean 'wear'" in str(unknown.exception)


def write_held_out(folder: Path, name: str, packed: Bundle, seed: int, errors: float) -> list[str]:
    """Write rows with labels of state and wear; errors of wear are three times as large where u is above 0."""
    weather, rows = still_air(60, 2)[:, None], waves(1800, seed=seed)
    inference = Inference(packed.manifest, runtime.load_model(packed.manifest, packed.model_bytes))
    joined = {"weather": JoinedRows(weather, np.arange(60) * AIR_STEP_US)}
    result = inference.run(rows, np.arange(len(rows)) * 10_000, joined=joined)
    last = result.cut.starts + 7
    scale = errors * np.where(rows[last, 0] > 0, 3.0, 1.0)
    wear = result.scores.extra_columns["value_wear"] + np.random.default_rng(seed).normal(size=len(last)) * scale
    labels = dict(zip(last.tolist(), wear.tolist(), strict=True))
    lines = write_csv(folder / name, WINDOWED, rows).read_text().splitlines()
    state = packed.manifest.output.labels[0]
    labelled = [f"{lines[0]},label,label_wear"]
    labelled += [f"{line},{state if i in labels else ''},{labels.get(i, '')}" for i, line in enumerate(lines[1:])]
    (folder / name).write_text("\n".join(labelled) + "\n")
    return [str(folder / name), "--join", f"weather={write_csv(folder / 'air.csv', ('air',), weather, step_s=0.31)}"]


def test_held_out_labels_of_a_further_number_tell_its_error_to_pack_evaluate_and_against(
    tmp_path: Path, packed: Bundle
) -> None:
    spec = write_joined_spec(tmp_path)
    write_csv(tmp_path / "weather.csv", ("air",), still_air(60, 2)[:, None], step_s=0.31)
    write_held_out(tmp_path, "held_out.csv", packed, 6, 1.0)
    spec.write_text(spec.read_text().replace("[output]", '[output]\nheld_out = "held_out.csv"'))
    made = pack.pack(spec, KEY)
    assert "wear: devices estimate the mean absolute error without labels, from the inputs" in made.notes
    pack.write_bundle(made, tmp_path / "bundle")
    fresh = write_held_out(tmp_path, "fresh.csv", packed, 7, 1.0)
    command = ["evaluate", str(tmp_path / "bundle"), *fresh, "--no-latency", "--json", "--output", "wear"]
    done = CliRunner().invoke(model, [*command, "--against", str(tmp_path / "bundle")])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    measured = {metric["metric"]: metric["value"] for metric in document["metrics"]}
    assert measured["expected_mae"] == pytest.approx(measured["mae"], rel=0.2)
    [labels] = [rule for rule in document["against"]["rules"] if rule["rule"] == "labels"]
    assert f"Expected without labels: {measured['expected_mae']:.4g}" in labels["summary"]
