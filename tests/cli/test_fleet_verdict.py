"""Commands `fleet labels verdict` and `fleet labels next`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.foundation.cli.commands import cli
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.workbench.testing.messages import FLEET, MessageSender

NOW = "2026-11-24T22:20:00.000000Z"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A fleet whose device pi-07 has results at the rows 1, 101 and 201, and an alert about row 101."""
    config = init_fleet(tmp_path / FLEET, FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
    store, sender = FleetStore(config.fleet.db), MessageSender()
    store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
    members = {"alert": "result", "subject": "fall", "state": "raised", "severity": "warning", "summary": "a fall"}
    raised = {"id": f"{sender.task}/result/fall/1", "evidence": {"rule": "fall", "row": 101}}
    messages = [sender.results(), sender.append("alerts", task=sender.task, **members, **raised)]
    store.ingest([Arrival(sender.verify(message)) for message in messages], [], NOW)
    store.close()
    return tmp_path / FLEET


def run(folder: Path, *arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(cli, ["fleet", *arguments, "--dir", str(folder), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_results_and_alerts_get_verdicts_which_a_list_shows_by_person(folder: Path) -> None:
    [first, *_] = run(folder, "label-next", "--device", "pi-07")
    assert (first["row"], first["reason"]) == (1, "uncertain")
    given = run(folder, "verdict", "result", "pi-07", "exercise", "1", "--by", "eva")
    assert (given["verdict"], given["label"]) == ("confirmed", given["predicted"])
    [alert] = [row for row in run(folder, "alerts") if row["subject"] == "fall"]
    outcome = run(folder, "verdict", "alert", alert["incident"], "false-alarm", "--label", "ABD", "--by", "otto")
    assert outcome["summary"].endswith("row 101 is ABD")
    listed = run(folder, "verdict", "list")
    assert [(row["given_by"], row["n"]) for row in listed["people"]] == [("eva", 1), ("otto", 1)]
    assert (listed["disputed"], listed["warnings"]) == (0, [])
    assert {row["row"] for row in run(folder, "label-next")} == {201}
    run(folder, "verdict", "result", "pi-07", "exercise", "1", "--by", "eva", "--withdraw")
    assert [row["given_by"] for row in run(folder, "verdict", "list")["people"]] == ["otto"]


def test_a_verdict_on_nothing_is_refused_with_a_reason(folder: Path) -> None:
    arguments = ["fleet", "verdict", "result", "pi-07", "exercise", "77", "--dir", str(folder)]
    result = CliRunner().invoke(cli, arguments)
    assert "has no result of task 'exercise' of pi-07 at row 77" in str(result.exception)
