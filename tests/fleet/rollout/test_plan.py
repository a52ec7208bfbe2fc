"""The file of a roll-out: what it says is what is kept and told to devices; every mistake is named with its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.fleet.rollout import bundles
from outstation.fleet.rollout.plan import Promotion, RolloutPlan, RolloutStep, read
from outstation.foundation.errors import BadBundle, ConfigError
from outstation.protocol.wire.desired_state import CanaryRules, DesiredBundle
from outstation.workbench.testing.messages import NEW_MODEL

SHIPPED = Path(__file__).parents[3] / "models" / "exercise"
FILE = f"""
[rollout]
name = "exercise-1-1"
task = "exercise"
bundle = "exercise"
version = "1.1.0"
digest = "{NEW_MODEL["digest"]}"
deadline = "2026-12-31T00:00:00Z"
[[steps]]
strategy = "shadow"
[[steps]]
strategy = "canary"
percent = 10
min_hours = 24
[[steps]]
strategy = "canary"
percent = 50
min_agreement = 0.95
[[steps]]
strategy = "all"
[promote]
min_devices = 4
min_agreement = 0.9
max_latency_ratio = 1.5
[device_rules]
min_batches = 30
max_accuracy_drop = 0.1
"""


def written(folder: Path, text: str = FILE) -> Path:
    path = folder / "rollout.toml"
    path.write_text(text, encoding="utf-8")
    return path


def resolved(folder: Path, text: str = FILE) -> RolloutPlan:
    plan_file = read(written(folder, text))
    return bundles.resolve(plan_file, bundles.read_bundle(plan_file), folder)


def test_a_plan_has_the_rules_of_each_step(tmp_path: Path) -> None:
    plan = resolved(tmp_path)
    assert (plan.name, plan.task, plan.bundle, plan.version, plan.digest, plan.target) == (
        *("exercise-1-1", "exercise", "exercise", "1.1.0", NEW_MODEL["digest"], "all"),
    )
    common = Promotion(min_devices=4, min_agreement=0.9, max_latency_ratio=1.5)
    assert plan.steps == [
        RolloutStep("shadow", 100.0, common),
        RolloutStep("canary", 10.0, msgspec.structs.replace(common, min_hours=24.0)),
        RolloutStep("canary", 50.0, msgspec.structs.replace(common, min_agreement=0.95)),
        RolloutStep("all", 100.0, common),
    ]
    assert plan.device_rules == CanaryRules(min_batches=30, max_accuracy_drop=0.1)


def test_the_desired_state_has_step_deadline_and_device_rules(tmp_path: Path) -> None:
    plan = resolved(tmp_path)
    identity = ("exercise-1-1", "exercise", "1.1.0", NEW_MODEL["digest"])
    tail = ("2026-12-31T00:00:00Z", CanaryRules(min_batches=30, max_accuracy_drop=0.1))
    assert plan.desired_for_step(2) == DesiredBundle(*identity, "canary", 10.0, *tail)
    assert plan.desired_after_abort() == DesiredBundle(*identity, "rollback", 100.0, *tail)


@pytest.mark.parametrize(
    ("to", "topic"),
    [
        ("all", "outstation/acme/_all/desired"),
        ("group:roof", "outstation/acme/_group/desired/roof"),
        ("device:pi-07", "outstation/acme/pi-07/desired"),
    ],
)
def test_the_target_selects_the_topic(tmp_path: Path, to: str, topic: str) -> None:
    assert (
        str(resolved(tmp_path, FILE.replace("[[steps]]", f'target = "{to}"\n[[steps]]', 1)).desired_topic("acme"))
        == topic
    )


@pytest.mark.parametrize("deadline", ['"2027-01-01T01:00:00+01:00"', "2027-01-01T00:00:00Z"])
def test_a_deadline_is_a_text_or_a_toml_time_in_any_zone(tmp_path: Path, deadline: str) -> None:
    assert resolved(tmp_path, FILE.replace('"2026-12-31T00:00:00Z"', deadline)).deadline == "2027-01-01T00:00:00Z"


WRONG = {
    "unknown key": ("[promote]", "[promote]\nmin_agreemnt = 1", "promote.min_agreemnt", "did you mean 'min_agreement'"),
    "no strategy": ('strategy = "canary"', 'strategy = "canry"', "steps[1].strategy", "did you mean 'canary'"),
    "rollback": ('strategy = "canary"', 'strategy = "rollback"', "steps[1].strategy", "not a valid choice"),
    "percent": ("percent = 10", "percent = 110", "steps[1].percent", "at most 100"),
    "nobody": ("percent = 10", "percent = 0", "steps[1].percent", "above 0"),
    "fewer": ("percent = 10", "percent = 60", "steps[2].percent", "no more than the previous step has"),
    "shadow late": ('"canary"\npercent = 10', '"all"', "steps[2].strategy", "cannot come after all"),
    "part of all": ('strategy = "all"', 'strategy = "all"\npercent = 90', "steps[3].percent", "must be 100"),
    "no last step": ('strategy = "all"', 'strategy = "canary"\npercent = 60', "steps", 'strategy = "all"'),
    "name": ('"exercise-1-1"', '"../exercise"', "rollout.name", "a-z 0-9"),
    "to": ("[[steps]]", 'target = "roof"\n[[steps]]', "rollout.target", "group:NAME"),
    "no version": ('version = "1.1.0"', "", "rollout.version", "is missing"),
    "digest": ('"sha256:', '"sha1:', "rollout.digest", "64 of 0-9 a-f"),
    "deadline": ('"2026-12-31T00:00:00Z"', '"tomorrow"', "rollout.deadline", "write one in UTC"),
    "local deadline": ('"2026-12-31T00:00:00Z"', "2026-12-31T00:00:00", "rollout.deadline", "write one in UTC"),
    "deadline's kind": ('"2026-12-31T00:00:00Z"', "7", "rollout.deadline", "write one in UTC"),
    "share": ("min_agreement = 0.9\n", "min_agreement = 90\n", "promote.min_agreement", "at most 1"),
    "nan": ("min_agreement = 0.9\n", "min_agreement = nan\n", "promote.min_agreement", "give a finite number"),
    "device's rule": (
        "[device_rules]",
        "[device_rules]\nhold_hours = 1",
        "device_rules.hold_hours",
        "did you mean 'hold_off_hours'",
    ),
    "nothing asked": ("min_agreement = 0.9\nmax_latency_ratio = 1.5", "", "steps[0]", "has no limit on predictions"),
    "no steps": (FILE[FILE.index("[[steps]]") : FILE.index("[promote]")], "", "steps", "required"),
}


@pytest.mark.parametrize("name", WRONG)
def test_every_mistake_is_named_with_file_key_and_fix(tmp_path: Path, name: str) -> None:
    old, new, key, fix = WRONG[name]
    assert old in FILE
    text = FILE.replace(old, new, 1)
    with pytest.raises(ConfigError) as error:
        read(written(tmp_path, text))
    assert (error.value.file, error.value.key) == (str(tmp_path / "rollout.toml"), key)
    assert fix in error.value.problem


def test_an_invalid_or_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid TOML"):
        read(written(tmp_path, "[rollout"))
    with pytest.raises(ConfigError, match="no such file"):
        read(tmp_path / "none.toml")


numbers = st.one_of(st.integers(-5, 200), st.floats(allow_nan=True, allow_infinity=True, width=32))
steps = st.lists(
    st.fixed_dictionaries(
        {"strategy": st.sampled_from(["shadow", "canary", "all", "rollback", ""]), "percent": numbers},
        optional={"min_agreement": numbers, "min_devices": numbers, "min_hours": numbers},
    ),
    max_size=6,
)


@given(
    steps=steps,
    promote=st.dictionaries(st.sampled_from(["min_agreement", "max_latency_ratio", "max_failed_share", "x"]), numbers),
)
def test_any_steps_give_a_valid_plan_or_an_error_with_its_key(
    tmp_path_factory: pytest.TempPathFactory, steps: list[dict[str, Any]], promote: dict[str, Any]
) -> None:
    def toml(value: Any) -> str:
        return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")

    lines = [FILE[: FILE.index("[[steps]]")]]
    for step in steps:
        lines += ["[[steps]]", *(f"{key} = {toml(value)}" for key, value in step.items())]
    lines += ["[promote]", *(f"{key} = {toml(value)}" for key, value in promote.items())]
    folder = tmp_path_factory.mktemp("plan")
    try:
        plan = resolved(folder, "\n".join(lines))
    except ConfigError as error:
        keyless = not error.key
    else:
        keyless = False
        _require_whole(plan)
    assert not keyless


def _require_whole(plan: RolloutPlan) -> None:
    assert plan.steps[-1].strategy == "all"
    assert msgspec.json.decode(msgspec.json.encode(plan), type=RolloutPlan) == plan
    for i in range(1, len(plan.steps)):
        assert plan.steps[i].strategy != plan.steps[i - 1].strategy or plan.steps[i].percent > plan.steps[i - 1].percent
    for i in range(len(plan.steps)):
        assert msgspec.json.decode(
            msgspec.json.encode(plan.desired_for_step(i + 1)), type=DesiredBundle
        ) == plan.desired_for_step(i + 1)


REQUIREMENTS = {
    "kind": "classify",
    "fields": ["ax"],
    "window": 1,
    "agent": "0.1.0",
    "runtimes": [],
    "memory": 0,
    "unpacked": 0,
}


def repository(folder: Path, *offered: dict[str, str], bundle: str = "exercise", edition: int = 3) -> None:
    metadata = folder / "repository" / "metadata"
    metadata.mkdir(parents=True, exist_ok=True)
    targets = {
        f"{bundle}/{entry['version']}/{entry['digest'][7:23]}.zip": {
            "length": 1,
            "custom": {"outstation": {**REQUIREMENTS, **entry}},
        }
        for entry in offered
    }
    signed = {"_type": "targets", "version": edition, "targets": targets}
    text = json.dumps({"signatures": [], "signed": signed})
    (metadata / f"{edition}.{bundle}.json").write_text(text, encoding="utf-8")


def test_a_version_is_looked_up_in_the_newest_edition_of_the_repository(tmp_path: Path) -> None:
    without = FILE.replace(f'digest = "{NEW_MODEL["digest"]}"\n', "")
    repository(tmp_path, {**NEW_MODEL, "digest": "sha256:" + "00" * 32}, edition=9)
    repository(tmp_path, {**NEW_MODEL, "version": "1.0.0", "digest": "sha256:" + "11" * 32}, NEW_MODEL, edition=10)
    assert resolved(tmp_path, without).digest == NEW_MODEL["digest"]


def test_an_unpublished_bundle_cannot_be_rolled_out(tmp_path: Path) -> None:
    repository(tmp_path, {**NEW_MODEL, "version": "1.0.0"})
    with pytest.raises(ConfigError, match=r"rollout.version: the repository has no exercise 1.1.0 \(it has: 1.0.0\)"):
        resolved(tmp_path)


def test_an_unpublished_digest_is_refused(tmp_path: Path) -> None:
    repository(tmp_path, {**NEW_MODEL, "digest": "sha256:" + "11" * 32})
    with pytest.raises(
        ConfigError, match=r"rollout.digest: is sha256:cd.*the repository's exercise 1.1.0 is sha256:11"
    ):
        resolved(tmp_path)


def test_without_a_repository_the_digest_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no repository to look up"):
        resolved(tmp_path, FILE.replace(f'digest = "{NEW_MODEL["digest"]}"\n', ""))


@pytest.mark.parametrize("text", ["{", '{"signed": {"targets": 5}}', "[]"])
def test_unreadable_metadata_are_named(tmp_path: Path, text: str) -> None:
    repository(tmp_path, NEW_MODEL)
    (tmp_path / "repository" / "metadata" / "3.exercise.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadBundle, match=r"3\.exercise\.json: cannot be read"):
        resolved(tmp_path)


def test_name_version_and_digest_can_be_read_from_a_bundle(tmp_path: Path) -> None:
    text = FILE.replace('bundle = "exercise"\nversion = "1.1.0"\n', f'path = "{SHIPPED}"\n')
    plan = resolved(tmp_path, text.replace(f'digest = "{NEW_MODEL["digest"]}"\n', ""))
    manifest = json.loads((SHIPPED / "manifest.json").read_text(encoding="utf-8"))
    assert (plan.bundle, plan.version) == (manifest["name"], manifest["version"])
    with pytest.raises(ConfigError, match=r"rollout\.digest: is sha256:cd"):
        resolved(tmp_path, text)
