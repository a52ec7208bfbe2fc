"""Commands `outstation label` and `outstation fleet labels add`: label files with and without a daemon, end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from outstation.device.cli.labelling.label import read_labels
from outstation.foundation.cli.commands import cli
from outstation.foundation.errors import UsageError
from outstation.ml.datasets.recordings import load
from outstation.ml.performance.labels import Label
from outstation.workbench.testing.fleet import FIELDS, RECORDINGS, LocalFleet
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import run_outstation
from tests.kit.commands import audit_fleet, call_outstation

WINDOW = 100
T0 = 1_764_022_680.0
STREAM = """
[streams.watch]
fields = [{fields}, {{ name = "side", type = "category" }}]
[tasks.exercise]
stream = "watch"
bundle = "exercise"
slices = ["side", {{ field = "ax", edges = [0.0, 0.5] }}]
"""


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit | UsageError), result.exception
    return result.exit_code, result.output


def played(rows: int) -> tuple[Any, list[str]]:
    """Recorded rows (rows, 6), one recording after the other, and the exercise of each."""
    recordings = load(RECORDINGS)
    parts = list(zip(recordings.starts[:-1], recordings.starts[1:], recordings.label, strict=True))
    truth = np.concatenate([np.full(end - start, label) for start, end, label in parts])
    return recordings.rows[:rows], [recordings.labels[label] for label in truth[:rows]]


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device that has run over 8,000 recorded readings, two seconds a window; no daemon."""
    home = tmp_path_factory.mktemp("device")
    assert run("init", home, "--id", "pi-07")[0] == 0
    config = home / "outstation.toml"
    fields = ", ".join(f'{{ name = "{name}" }}' for name in FIELDS)
    config.write_text(config.read_text(encoding="utf-8") + STREAM.format(fields=fields), encoding="utf-8")
    values, _ = played(8_000)
    lines = [",".join(["t", *FIELDS, "side"])]
    for i, row in enumerate(values.tolist()):
        lines.append(f"{T0 + i / 50},{','.join(map(str, row))},{'left' if i // 400 % 2 else 'right'}")
    (home / "readings.csv").write_text("\n".join(lines) + "\n")
    assert run("ingest", "watch", home / "readings.csv", "-c", config)[0] == 0
    assert run("batch", "-c", config)[0] == 0
    return home


@pytest.fixture
def home(used: Path, tmp_path: Path) -> Path:
    shutil.copytree(used, tmp_path / "device")
    return tmp_path / "device"


def test_labels_in_a_file_become_the_accuracy_that_status_shows(home: Path) -> None:
    _, truth = played(8_000)
    rows = range(WINDOW, 8_001, WINDOW)
    (home / "truth.csv").write_text("row,label\n" + "".join(f"{row},{truth[row - 1]}\n" for row in rows))
    config = home / "outstation.toml"
    code, output = run("label", "exercise", home / "truth.csv", "-c", config)
    assert (code, output) == (0, "80 labels accepted, 0 rejected\n")
    assert run("batch", "-c", config)[0] == 0
    code, output = run("status", "--json", "-c", config)
    quality = json.loads(output)["tasks"][0]["quality"]
    by_metric = {(metric["metric"], metric.get("slice", "")): metric for metric in quality["metrics"]}
    assert by_metric["accuracy", ""]["n"] == 80
    assert by_metric["accuracy", ""]["value"] > 0.5
    assert {"side=left", "side=right", "ax=from 0.5"} <= {name for _, name in by_metric}
    assert quality["estimate"] is None or 0 < quality["estimate"]["accuracy"] <= 1
    assert f"accuracy {by_metric['accuracy', '']['value']:.3g} (" in run("status", "-c", config)[1]


def test_each_label_that_cannot_be_joined_is_named_with_its_line(home: Path) -> None:
    (home / "truth.jsonl").write_text(
        '{"row": 100, "label": "PEN"}\n{"row": 101, "label": "PEN"}\n\n{"row": 200, "label": "JUMP"}\nnonsense\n'
        '{"t": 1764022685.98, "label": "PEN", "source": "system"}\n{"row": 99999, "label": "PEN"}\n{"row": 1}\n'
    )
    code, output = run("label", "exercise", home / "truth.jsonl", "--json", "-c", home / "outstation.toml")
    document = json.loads(output)
    assert (code, document["accepted"]) == (1, 2)
    reasons = {rejected["line"]: rejected["reason"] for rejected in document["rejected"]}
    assert reasons[2] == "row 101 has no result of its own; the result of a window is at its last row"
    assert reasons[4].startswith("this is no label of this model; it knows ")
    assert reasons[5].startswith("not one JSON object")
    assert reasons[7] == "row 99999 does not exist yet; the stream has 8000"
    assert reasons[8].startswith("a label must be")
    assert set(reasons) == {2, 4, 5, 7, 8}


def test_a_task_that_does_not_exist_is_named(home: Path) -> None:
    completed = run_outstation(
        "label", "exercize", "-", "-c", str(home / "outstation.toml"), input="row,label\n1,PEN\n"
    )
    assert completed.returncode == 2
    assert "there is no task 'exercize'; did you mean 'exercise'?" in completed.stderr


@pytest.mark.parametrize("head", ["row", "label", "row,label,colour", "row,label,label", ""])
def test_a_file_without_the_right_columns_is_refused_as_a_whole(tmp_path: Path, head: str) -> None:
    (tmp_path / "truth.csv").write_text(f"{head}\n1,a\n")
    with pytest.raises(UsageError, match=r"truth\.csv: "):
        list(read_labels(str(tmp_path / "truth.csv")))


def test_times_may_be_seconds_or_rfc_3339(tmp_path: Path) -> None:
    (tmp_path / "truth.csv").write_text("t,label,source\n1764022680.5,a,\n2025-11-24T22:18:00.5Z,b,model\nnoon,c,\n")
    labels = list(read_labels(str(tmp_path / "truth.csv")))
    assert labels[:2] == [
        (2, Label(None, 1_764_022_680_500_000, "a", "human")),
        (3, Label(None, 1_764_022_680_500_000, "b", "model")),
    ]
    assert isinstance(labels[2][1], str)


def test_labels_go_through_the_daemon_to_the_collector_and_there_too(tmp_path: Path) -> None:
    with LocalFleet(tmp_path) as fleet:
        fleet.broker.start()
        fleet.collector.start()
        device = fleet.add_device("pi-01").add_replay_stream(8_000, 150.0).add_task("exercise").start_and_wait()
        results = "SELECT row, label FROM results WHERE device = 'pi-01' ORDER BY row"
        wait_until("results", lambda: len(fleet.query(results)) >= 65)
        rows = fleet.query(results)
        (tmp_path / "truth.csv").write_text("row,label\n" + "".join(f"{row},{label}\n" for row, label in rows[:60]))
        config = str(device.config)
        completed = call_outstation("label", "exercise", str(tmp_path / "truth.csv"), "-c", config, "--json")
        assert json.loads(completed.stdout) == {"accepted": 60, "rejected": []}
        metric = "SELECT value, n, source FROM metrics WHERE metric = 'accuracy' AND slice = ''"
        wait_until("the quality message", lambda: fleet.query(metric))
        assert fleet.query(metric) == [(1.0, 60, "device")]
        (tmp_path / "more.csv").write_text("row,label\n" + "".join(f"{row},PEN\n" for row, _ in rows[:60]))
        home = str(fleet.home)
        completed = call_outstation(
            "fleet", "label", "pi-01", "exercise", str(tmp_path / "more.csv"), "--dir", home, "--json"
        )
        assert completed.returncode == 0, completed.stderr
        document = json.loads(completed.stdout)
        accuracy = next(entry for entry in document["metrics"] if entry["metric"] == "accuracy")
        assert accuracy["value"] == pytest.approx(sum(label == "PEN" for _, label in rows[:60]) / 60, abs=1e-5)
        assert fleet.query(f"{metric} AND source = 'collector'")[0][1:] == (60, "collector")
        sent = [f"{row},{label}" for row, label in rows[60:65]] + ["3,PEN", "1000000,PEN", "100,XYZ"]
        (tmp_path / "sent.csv").write_text("row,label\n" + "\n".join(sent) + "\n")
        for _ in range(2):
            file = str(tmp_path / "sent.csv")
            completed = call_outstation("fleet", "label", "pi-01", "exercise", file, "--send", "--dir", home, "--json")
            assert completed.returncode == 1, completed.stderr
            document = json.loads(completed.stdout)
            assert (document["accepted"], [entry["line"] for entry in document["rejected"]]) == (5, [7, 8, 9])
        assert device.stop() == 0
        wait_until("all is collected", lambda: audit_fleet(fleet.home)[0] == 0)


def test_a_verdict_on_the_device_is_a_label_with_an_author_and_no_ground_truth(home: Path) -> None:
    config = home / "outstation.toml"
    code, output = run("verdict", "exercise", 100, "--by", "eva", "--json", "-c", config)
    confirmed = json.loads(output)
    assert (code, confirmed["verdict"], confirmed["label"]) == (0, "confirmed", confirmed["predicted"])
    other = "ABD" if confirmed["label"] != "ABD" else "PEN"
    assert run("verdict", "exercise", 200, other, "--by", "eva", "-c", config)[0] == 0
    assert run("verdict", "exercise", 101, "-c", config)[0] == 1
    document = json.loads(run("status", "--json", "-c", config)[1])["tasks"][0]["labels"]
    assert document == {"truth": 0, "verdicts": 2, "model": 0, "authenticated": 2, "waiting": 0}
    assert "labels: 0 of ground truth, 2 verdicts; 2 authenticated" in run("status", "-c", config)[1]


def test_what_to_label_next_on_the_device_has_no_label_yet(home: Path) -> None:
    config = home / "outstation.toml"
    assert run("verdict", "exercise", 100, "-c", config)[0] == 0
    code, output = run("label-next", "exercise", "--limit", 79, "--json", "-c", config)
    requests = json.loads(output)
    assert code == 0
    assert {each["reason"] for each in requests} >= {"uncertain", "random"}
    assert 100 not in {each["row"] for each in requests}
    first = next(each for each in requests if each["reason"] == "uncertain")
    assert first["score"] == min(each["score"] for each in requests)
    assert "uncertain" in run("label-next", "exercise", "-c", config)[1]


def test_a_token_belongs_to_one_name(home: Path) -> None:
    config = home / "outstation.toml"
    assert run("verdict", "exercise", 100, "-c", config)[0] == 0
    tokens = {name: run("label-token", name, "-c", config)[1].strip() for name in ("power-meter", "eva")}
    assert len(set(tokens.values())) == 2
    assert (home / "data" / "labels.key").stat().st_mode & 0o077 == 0
    assert run("label-token", "../eva", "-c", config)[0] != 0
