"""`outstation privacy` and the rules in `[streams.NAME.privacy]`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from outstation.device import config
from outstation.device.batch_parts.result_part import _leave_out_rare
from outstation.device.bootstrap import device
from outstation.device.cli.owner.privacy import build_document
from outstation.device.recovery.open import open_store
from outstation.foundation.cli.commands import cli
from outstation.foundation.errors import ConfigError
from outstation.ml.model.inference.scores import Labels
from tests.kit.commands import call_outstation

CONFIG = """\
[device]
id = "pi-07"
fleet = "acme"
data_dir = "data"
[collector]
delivery = "broker"
[streams.ward]
fields = [
  { name = "pulse" },
  { name = "warmth", min = 30, max = 45 },
  { name = "noise" },
  { name = "room", type = "category" },
]
[tasks.risk]
stream = "ward"
bundle = "risk"
slices = ["room"]
"""
RULES = '[streams.ward.privacy]\nprivate = ["pulse"]\nround = { warmth = 0.5 }\nhash = ["room"]\n'


def shown(folder: Path, rules: str) -> dict[str, Any]:
    (folder / "outstation.toml").write_text(CONFIG + rules)
    done = call_outstation("privacy", "--json", "-c", str(folder / "outstation.toml"))
    assert done.returncode == 0, done.stderr
    [stream] = json.loads(done.stdout)["streams"]
    return {field["field"]: (field["rule"], json.dumps(field["leaves"])) for field in stream["fields"]}


def test_what_leaves_of_each_field_is_shown_by_examples_that_went_through_the_rules(tmp_path: Path) -> None:
    fields = shown(tmp_path, RULES)
    assert [rule for rule, _ in fields.values()] == ["private", "round to 0.5", "open", "hash, a new key every 30 days"]
    # 39.270 is the made-up reading of warmth, 21.374 that of the others.
    assert "39.5" in fields["warmth"][1]
    assert "39.27" not in fields["warmth"][1]
    assert "21.374" in fields["noise"][1]
    assert "21.37" not in fields["pulse"][1]
    assert "room=h:" in fields["room"][1]
    assert "Room 7" not in fields["room"][1]
    by_default = shown(tmp_path, "")
    assert all("21.374" in leaves or "39.27" in leaves for _, leaves in by_default.values())
    assert "Room 7" in by_default["room"][1]


def test_messages_that_stay_are_not_listed(tmp_path: Path) -> None:
    fields = shown(tmp_path, '[streams.ward.privacy]\nmessages = ["alerts"]\n')
    assert {leaf["message"] for _, leaves in fields.values() for leaf in json.loads(leaves)} == {"alerts", "audit"}


def test_a_field_leaves_if_one_task_of_its_stream_sends_it(tmp_path: Path) -> None:
    file = tmp_path / "outstation.toml"
    file.write_text(
        CONFIG + '[tasks.risk.inputs.air]\nstream = "yard"\n[streams.yard]\nfields = [{ name = "warmth" }]\n'
        '[streams.yard.privacy]\nmessages = ["results", "quality"]\nprivate = ["warmth"]\n'
        '[tasks.plain]\nstream = "ward"\nbundle = "risk"\n'
    )
    fields = {field["field"]: field["leaves"] for field in build_document(config.load(file))["streams"][0]["fields"]}
    senders = {name: {leaf["message"]: leaf["tasks"] for leaf in leaves} for name, leaves in fields.items()}
    plain = {"drift": ["plain"], "alerts": ["plain"]}
    assert senders["noise"] == plain | {"audit": ["risk", "plain"]}
    assert senders["room"] == plain | {"audit": ["risk", "plain"], "quality": ["risk"]}
    assert [leaf["tasks"] for leaf in fields["warmth"] if leaf["message"] == "audit"] == [["risk"], ["plain"]]
    assert "39.27" in json.dumps([leaf for leaf in fields["warmth"] if leaf["tasks"] == ["plain"]])
    assert "39.27" not in json.dumps([leaf for leaf in fields["warmth"] if leaf["tasks"] == ["risk"]])
    printed = CliRunner().invoke(cli, ["privacy", "-c", str(file)]).stdout
    assert "drift (plain)" in printed
    assert "quality (risk)" in printed
    assert "audit (risk, plain)" not in printed


def test_a_person_sees_the_rules_as_a_table(tmp_path: Path) -> None:
    (tmp_path / "outstation.toml").write_text(CONFIG + RULES)
    done = call_outstation("privacy", "-c", str(tmp_path / "outstation.toml"))
    assert done.returncode == 0
    assert "stream ward, tasks risk" in done.stdout
    assert "round to 0.5" in done.stdout


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ('private = ["puls"]', "no field 'puls'; did you mean 'pulse'?"),
        ('private = ["room"]\nhash = ["room"]', "'room' is in private, too"),
        ('hash = ["pulse"]', "'pulse' is a number; put it into round or private"),
        ("round = { room = 1 }", "'room' is a category; put it into hash or private"),
        ("round = { pulse = 0 }", "the step of 'pulse' must be above 0"),
        ('allow = ["pulse"]\nprivate = ["pulse"]', "'pulse' is in private, too"),
        ('hash = ["room"]\nhash_period = "10 s"', "must be at least 1 h"),
        ('messages = ["health"]', "health"),
    ],
)
def test_rules_that_contradict_themselves_or_the_stream_are_refused(tmp_path: Path, rules: str, problem: str) -> None:
    (tmp_path / "outstation.toml").write_text(f"{CONFIG}[streams.ward.privacy]\n{rules}\n")
    with pytest.raises(ConfigError, match=r"streams\.ward\.privacy") as refused:
        config.load(tmp_path / "outstation.toml")
    assert problem in str(refused.value)


def test_an_allow_list_makes_all_other_fields_private(tmp_path: Path) -> None:
    (tmp_path / "outstation.toml").write_text(f'{CONFIG}[streams.ward.privacy]\nallow = ["noise"]\nhash = ["room"]\n')
    rules = config.load(tmp_path / "outstation.toml").streams["ward"].privacy
    assert rules.private_fields(["pulse", "warmth", "noise", "room"]) == {"pulse", "warmth"}


def test_rows_of_a_stream_with_protected_fields_are_not_disclosed(tmp_path: Path) -> None:
    (tmp_path / "outstation.toml").write_text(CONFIG + RULES)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "commitment.secret").write_bytes(bytes(32))
    open_store(tmp_path / "data").close()
    done = call_outstation("disclose", "risk", "--rows", "1-2", "-c", str(tmp_path / "outstation.toml"))
    assert done.returncode == 2
    assert "pulse, room, warmth may not leave as stored" in done.stderr


def test_results_of_a_class_below_the_least_count_are_not_listed() -> None:
    published = np.arange(8)
    labels = Labels.from_list(["rest", "rest", "fall", "rest", "walk", "walk", "rest", "walk"])
    assert _leave_out_rare(published, labels, 3).tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert _leave_out_rare(published, labels, 1).tolist() == published.tolist()
    assert _leave_out_rare(published, None, 9).tolist() == []
    assert _leave_out_rare(published, None, 8).tolist() == published.tolist()


def test_messages_about_a_task_obey_the_strictest_rules_of_the_streams_that_it_joins(tmp_path: Path) -> None:
    file = tmp_path / "outstation.toml"
    file.write_text(
        CONFIG + '[tasks.risk.inputs.air]\nstream = "yard"\n'
        '[streams.yard]\nfields = [{ name = "wind" }, { name = "noise" }]\n'
        '[streams.yard.privacy]\nmessages = ["results", "alerts"]\nmin_count = 30\nprivate = ["wind"]\n'
        'round = { noise = 5 }\n[streams.ward.privacy]\nmessages = ["results", "drift"]\nmin_results = 4\n'
        "round = { noise = 0.5 }\n"
    )
    rules = device.build_privacy(config.load(file), bytes(32))["risk"]
    assert (rules.kinds, rules.min_count, rules.min_results) == (frozenset({"results"}), 30, 4)
    assert (rules.private, rules.steps) == (frozenset({"wind"}), {"noise": 5})
    assert rules.keeps("drift")
    assert rules.keeps("alerts")
    assert rules.mentions("wind was 3")
    done = call_outstation("privacy", "-c", str(file))
    assert done.returncode == 0, done.stderr
    assert "Joined by risk" in done.stdout
    assert "risk joins yard. The strictest rules hold: results; at least 30 readings" in done.stdout


def test_a_joined_stream_without_rules_leaves_those_of_the_tasks_own_stream(tmp_path: Path) -> None:
    file = tmp_path / "outstation.toml"
    file.write_text(
        CONFIG + RULES + '[tasks.risk.inputs.air]\nstream = "yard"\n[streams.yard]\nfields = [{ name = "wind" }]\n'
    )
    rules = device.build_privacy(config.load(file), bytes(32))["risk"]
    assert (rules.kinds, rules.private, rules.hashed) == (None, frozenset({"pulse"}), frozenset({"room"}))
    assert rules.key
