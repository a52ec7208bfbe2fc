"""Evidence after `fleet db prune`: chains begin where the collector signed that the messages before went."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outstation.fleet.database.maintenance.retention import Retention
from outstation.fleet.retention.prune import prune
from outstation.foundation.config.quantities import Duration
from outstation.protocol.wire import keys
from outstation.workbench.testing.messages import FLEET
from tests.kit.evidences import HOUR_US, T0_US, Story, activated, health
from tests.kit.received_evidence import OPERATOR, problems, resign


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """Return a folder that was made after the first messages of a device went."""
    story = Story.begin(tmp_path / "home")
    OPERATOR["key"] = story.operator
    sender, other = story.device("pi-07", 1), story.device("pi-08", 2)
    story.collect(sender, sender.results(2), sender.alert(), sender.results(1), hours=0)
    story.collect(sender, activated(story, sender, 100), health(story, sender, 101), hours=101)
    story.collect(other, activated(story, other, 100), health(story, other, 101), hours=101)
    key = keys.load_private(Path(story.config.collector.key_file))
    retention, now_us = Retention(messages=Duration(2 * 86400.0)), T0_US + 102 * HOUR_US
    assert prune(story.store, retention, FLEET, key, [key.public], now_us).devices[0].messages == 3
    story.make(tmp_path / "out")
    story.store.close()
    return tmp_path / "out"


def test_a_folder_after_a_pruning_verifies(pruned: Path) -> None:
    assert problems(pruned) == []
    [line] = (pruned / "retention.jsonl").read_text().splitlines()
    statement = json.loads(json.loads(line)["payload"])
    assert (statement["device"], statement["logs"][0]["messages"]) == ("pi-07", 3)


@pytest.mark.attack("history")
def test_missing_messages_without_the_statement_are_a_problem(pruned: Path) -> None:
    (pruned / "retention.jsonl").unlink()
    manifest = json.loads((pruned / "manifest.json").read_bytes())
    manifest["files"] = [file for file in manifest["files"] if file["path"] != "retention.jsonl"]
    (pruned / "manifest.json").write_text(json.dumps(manifest))
    resign(pruned)
    assert [problem for _, problem in problems(pruned) if "no device declared that" in problem]


@pytest.mark.attack("history")
@pytest.mark.parametrize(("old", "new"), [('"through":3', '"through":2'), ('"digest":"', '"digest":"A')])
def test_an_altered_statement_is_a_problem(pruned: Path, old: str, new: str) -> None:
    record = json.loads((pruned / "retention.jsonl").read_text())
    assert old in record["payload"]
    record["payload"] = record["payload"].replace(old, new)
    (pruned / "retention.jsonl").write_text(json.dumps(record) + "\n")
    resign(pruned)
    assert any("is not a valid retention statement" in problem for _, problem in problems(pruned))
