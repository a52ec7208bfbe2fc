"""Retraining sets: samples of a real device, opened and joined with labels, as they were known at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from outstation.fleet import config as fleet_config
from outstation.fleet.audit.audit import audit
from outstation.fleet.cli.group import fleet
from outstation.fleet.collector import encryption_keys
from outstation.fleet.database.datasets import samples
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.dataset import data_files, gather
from outstation.fleet.dataset.gather import Gathered, LabelledOutput, Recording, Selection
from outstation.fleet.dataset.sample_labels import RowLabel
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.fleet.labelling import given_labels
from outstation.foundation.errors import UsageError
from outstation.ml.performance.labels import Label
from outstation.protocol.transport import sample_content, sealing
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.sealing import Opener
from outstation.protocol.wire.keys import EncryptionKey, b64url_encode, encryption_key_of
from outstation.workbench.cli.model.group import model
from outstation.workbench.testing.messages import FLEET, MessageSender, SignedMessage
from scripts.kit.bundles import CLASSIFY, TABULAR, activated
from scripts.kit.bundles import model as tflite
from tests.kit.devices import DEVICE
from tests.kit.sampled_devices import CONSENT, FALL, LATER, SampledDevice

TASK = "tiny"
ROWS = "rrrrrlrr" + "-" * 20 + "lrr" + "r" * 20 + "lll---"
BEFORE, AFTER = "2026-11-25T12:00:00.000000Z", "2026-11-26T12:00:00.000000Z"
PREDICTED = {"l": "left", "r": "right", "-": "rest"}


@contextlib.contextmanager
def opened(home: Path) -> Iterator[FleetStore]:
    with FleetStore(fleet_config.load(home).fleet.db) as store:
        yield store


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fleet of one device that sent samples around three alerts."""
    folder = tmp_path_factory.mktemp("home")
    init_fleet(folder, FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
    key = encryption_keys.load_public(folder)
    assert key is not None
    device = SampledDevice(tmp_path_factory.mktemp("device"), CLASSIFY, activated(CLASSIFY), alerts=[FALL])
    device.consent(CONSENT, key)
    device.feed_text(ROWS)
    device.send()
    device.send(LATER)
    with opened(folder) as store:
        store.enrol("pi-07", DEVICE.public, replace=False, now=BEFORE)
        store.ingest([Arrival(message) for message in device.messages()], [], BEFORE)
    device.store.close()
    return folder


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    """A copy of the fleet, to be changed."""
    folder = tmp_path / "home"
    shutil.copytree(home, folder)
    return folder


def run(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(fleet, [*arguments, "--dir", str(home)])


def export(home: Path, out: Path, *arguments: str) -> dict[str, Any]:
    result = run(home, "dataset", "export", "--task", TASK, "--out", str(out), "--json", *arguments)
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def label(home: Path, entries: Sequence[tuple[int, str, str]], now: str = BEFORE) -> None:
    with opened(home) as store, store.transaction() as db:
        outcome = given_labels.add(
            db, "pi-07", TASK, [Label(row, None, text, source) for row, text, source in entries], now, "mira"
        )
        assert not outcome.rejected


def verdict(home: Path, row: int, text: str, by: str, given: str = BEFORE) -> None:
    with opened(home) as store, store.transaction() as db:
        [(log,)] = db.execute("SELECT log FROM logs").fetchall()
        key = ("pi-07", TASK, log, row, by)
        db.execute("INSERT INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                   (*key, "corrected", text, "left", None, "cli", "", given))  # fmt: skip


def sampled_rows(home: Path) -> list[str]:
    document = json.loads(run(home, "samples", "pi-07", "--json").stdout)
    return sorted(sample["rows"] for sample in document["samples"])


def test_samples_are_listed_without_their_content(home: Path) -> None:
    result = run(home, "samples", "pi-07")
    assert result.exit_code == 0, result.output
    assert "alert" in result.output
    document = json.loads(run(home, "samples", "pi-07", "--json").stdout)
    assert all(sample["readable"] for sample in document["samples"])
    assert sampled_rows(home) == ["18-22", "27-31", "4-8", "50-54"]


def test_readings_are_sealed_in_every_table_and_the_audit_verifies_them(home: Path) -> None:
    raw = b"".join(path.read_bytes() for path in home.glob("fleet.db*"))
    assert CONSENT.consent.encode() not in raw
    assert b"samples" in raw
    with opened(home) as store:
        assert audit(store).passed
        with store.transaction() as db:
            [(size, count)] = db.execute("SELECT sum(length(sealed)), count(*) FROM samples").fetchall()
            db.execute("UPDATE samples SET digits = 7 WHERE rows_first = 27")
        assert (size > 0, count) == (True, 4)
        report = audit(store)
        with store.transaction() as db:
            db.execute("UPDATE samples SET digits = 4")
    assert [problem["reason"] for problem in report.invalid] == ["differs from its rows in table samples"]


def test_a_set_goes_into_a_bundle_and_back_through_its_evaluation(copied: Path, tmp_path: Path) -> None:
    label(
        copied,
        [
            (6, "left", "human"),
            (8, "right", "human"),
            (31, "right", "human"),
            (29, "left", "human"),
            (27, "rest", "human"),
        ],
    )
    card = export(copied, tmp_path / "set", "--licence", "CC-BY-4.0")
    assert card["labels"]["by_class"] == {"left": 2, "rest": 1, "right": 2}
    assert card["licence"] == "CC-BY-4.0"
    data, spec = tmp_path / "set" / "data.parquet", tmp_path / "spec.toml"
    (tmp_path / "new.tflite").write_bytes(tflite(CLASSIFY.model))
    drafted = CliRunner().invoke(
        model, ["pack", "--from", str(tmp_path / "new.tflite"), "--data", str(data), "-o", str(spec)]
    )
    assert drafted.exit_code == 0, drafted.output
    assert f"labels = {json.dumps(['left', 'rest', 'right'])}" in spec.read_text()
    assert f"fields = {json.dumps(list(TABULAR))}" in spec.read_text()
    packed = CliRunner().invoke(model, ["pack", str(spec), "-o", str(tmp_path / "bundle")])
    assert packed.exit_code == 0, packed.output
    evaluated = CliRunner().invoke(model, ["evaluate", str(tmp_path / "bundle"), str(data), "--no-latency", "--json"])
    assert evaluated.exit_code == 0, evaluated.output
    document = json.loads(evaluated.stdout)["data"]
    assert document["windows"] == 5
    assert document["unlabelled"] == card["rows"] - 5


def test_labels_that_disagree_or_come_from_a_model_are_left_out_and_counted(copied: Path, tmp_path: Path) -> None:
    label(copied, [(6, "left", "human"), (29, "left", "human"), (5, "right", "model"), (31, "right", "system")])
    verdict(copied, 6, "left", "jo")
    verdict(copied, 29, "rest", "jo")
    card = export(copied, tmp_path / "set")
    assert card["labels"]["by_class"] == {"left": 1, "right": 1}
    assert card["labels"]["left_out"] == {"only a model labelled it": 1, "sources disagree": 1}
    assert card["labels"]["given_more_than_once"] == 1
    assert card["labels"]["by_person"] == {"jo": 1, "mira": 2}
    assert card["labels"]["by_source"] == {"corrected": 1, "human": 1, "system": 1}
    text = (tmp_path / "set" / "DATA_CARD.md").read_text()
    assert "1 results have labels that disagree" in text
    lines = [json.loads(line) for line in (tmp_path / "set" / "samples.jsonl").read_text().splitlines()]
    [decided] = [entry for line in lines for entry in line["labels"] if entry["row"] == 6]
    assert (decided["label"], decided["by"], decided["predicted"][0]) == ("left", ["jo", "mira"], "left")


def test_a_set_of_few_labels_is_written_but_not_known_to_be_clean(copied: Path, tmp_path: Path) -> None:
    label(copied, [(6, "left", "human")])
    result = run(copied, "dataset", "export", "--task", TASK, "--out", str(tmp_path / "set"), "--require-clean")
    assert result.exit_code == 1
    assert "not checked for poisoning: " in result.output
    assert "## Check for poisoning" in (tmp_path / "set" / "DATA_CARD.md").read_text()


def test_labels_and_samples_after_the_chosen_time_are_ignored(copied: Path, tmp_path: Path) -> None:
    label(copied, [(6, "left", "human")])
    label(copied, [(8, "right", "human")], now=AFTER)
    verdict(copied, 31, "right", "jo", AFTER)
    card = export(copied, tmp_path / "then", "--at", BEFORE)
    assert card["labels"]["by_class"] == {"left": 1}
    assert card["ignored_labels"] == {"labels given later": 1, "verdicts given later": 1}
    assert export(copied, tmp_path / "now")["labels"]["by_class"] == {"left": 1, "right": 2}
    result = run(copied, "dataset", "export", "--task", TASK, "--out", str(tmp_path / "early"), "--at", "2026-01-01")
    assert result.exit_code != 0
    assert "no readable sample" in str(result.exception)


def test_a_sample_has_the_drift_context_and_provenance_of_its_time(home: Path, tmp_path: Path) -> None:
    export(home, tmp_path / "set")
    lines = [json.loads(line) for line in (tmp_path / "set" / "samples.jsonl").read_text().splitlines()]
    samples = [sample for line in lines for sample in line["samples"]]
    assert all(sample["consent"] == CONSENT.consent for sample in samples)
    results = {f"tiny/fall/result/{n}" for n in (1, 2, 3)}
    assert {sample["subject"] for sample in samples} == results | {"tiny/a/fault/1"}
    assert all(sample["digest"].startswith("sha256:") for sample in samples)
    assert {sample["drift"]["state"] for sample in samples} <= {"ok", "fault", "drift", "insufficient"}
    assert all("tiny/a/fault/1" in {alert["id"] for alert in sample["open_alerts"]} for sample in samples)
    with opened(home) as store, store.snapshot() as db:
        stored = {row[0] for row in db.execute("SELECT seq FROM messages WHERE kind = 'samples'")}
    assert {sample["message"]["seq"] for sample in samples} == stored


def test_overlapping_samples_are_joined_so_that_no_row_is_there_twice(home: Path, tmp_path: Path) -> None:
    export(home, tmp_path / "set", "--format", "csv")
    lines = (tmp_path / "set" / "data.csv").read_text().splitlines()
    assert lines[0] == "t,a,b,c,d,label,device,recording,source"
    times = [line.partition(",")[0] for line in lines[1:]]
    assert len(times) == len(set(times))


def test_samples_sealed_to_a_deleted_key_are_counted(copied: Path, tmp_path: Path) -> None:
    for path in (copied / "encryption").iterdir():
        path.unlink()
    encryption_keys.create(copied)
    result = run(copied, "dataset", "export", "--task", TASK, "--out", str(tmp_path / "set"))
    assert result.exit_code != 0
    assert "4 sealed to another key left out" in str(result.exception)
    assert not (tmp_path / "set").exists()
    assert [*tmp_path.glob(".set*")] == []


def test_a_changed_file_of_a_set_fails_the_check(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    export(home, folder)
    assert run_check(folder).exit_code == 0
    (folder / "data.parquet").write_bytes((folder / "data.parquet").read_bytes()[:-1] + b"x")
    (folder / "extra.csv").touch()
    result = run_check(folder)
    assert result.exit_code == 1
    assert "data.parquet: is not the file" in result.output
    assert "extra.csv: is not in manifest.json" in result.output
    (folder / "data.parquet").unlink()
    os.mkfifo(folder / "data.parquet")
    assert "data.parquet: is a pipe, where a file is needed" in run_check(folder).output


def run_check(folder: Path) -> Result:
    return CliRunner().invoke(fleet, ["dataset", "check", str(folder)])


@pytest.mark.parametrize(
    ("fields", "reason"), [(["t", "label", "device", "z"], "other fields"), (["x"] * 4, "malformed content")]
)
def test_a_device_that_sends_other_fields_does_not_decide_about_the_samples_of_others(
    copied: Path, tmp_path: Path, fields: list[str], reason: str
) -> None:
    key = encryption_keys.load_public(copied)
    assert key is not None
    forger = MessageSender("pi-13", task=TASK)
    content = {"v": 1, "consent": "", "fields": fields, "t": [1], "columns": [[1.0]] * 4}
    sent = forge(forger, key, zlib.compress(json.dumps(content).encode()))
    with opened(copied) as store:
        store.enrol("pi-13", forger.key.public, replace=False, now=BEFORE)
        store.ingest([Arrival(forger.verify(sent))], [], BEFORE)
    card = export(copied, tmp_path / "set")
    assert card["left_out_samples"] == {reason: 1}
    assert list(card["fields"]) == list(TABULAR)


def test_a_sample_that_inflates_without_end_or_is_no_zlib_is_counted(copied: Path, tmp_path: Path) -> None:
    key = encryption_keys.load_public(copied)
    assert key is not None
    forger = MessageSender("pi-13", task=TASK)
    bomb = zlib.compress(b"[" * (64 << 20), 9)
    with opened(copied) as store:
        store.enrol("pi-13", forger.key.public, replace=False, now=BEFORE)
        sent = [forge(forger, key, data) for data in (bomb, b"x", b"")]
        store.ingest([Arrival(forger.verify(item)) for item in sent], [], BEFORE)
    assert export(copied, tmp_path / "set")["left_out_samples"] == {"malformed content": 2, "malformed seal": 1}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"fields": "[" + ",".join(['"a"'] * 50_000) + "]"}, "more than 4096 fields"),
        ({"t": "[" + ",".join(["1"] * 100_000) + "]"}, "a list has not 2 items"),
        ({"columns": "[" + ",".join(["[]"] * 100_000) + "]"}, "columns are not a list"),
        ({"columns": "[[1,2]," + ",".join(["0"] * 100_000) + "]"}, "columns are not a list"),
        ({"columns": "[[" + ",".join(["0"] * 100_000) + "]]"}, "a list has not 2 items"),
        ({"columns": '"[[1,2]]"'}, "columns are not a list"),
        ({"columns": '{"a":[1,2]}'}, "columns are not a list"),
        ({"columns": "[[1,2],]"}, "malformed"),
        ({"columns": "[[[1],2]]"}, "columns are not a list"),
        ({"columns": "[[1e999,2]]"}, "out of range"),
        ({"columns": '[["1",2]]'}, "Expected `float"),
        ({"t": "[1,99999999999999999999]"}, "none of the calendar"),
        ({"t": "[1,1e3]"}, "Expected `int`"),
    ],
)
def test_a_content_with_longer_lists_than_its_sample_has_rows_is_refused_before_they_are_parsed(
    members: dict[str, str], reason: str
) -> None:
    valid = {"v": "1", "consent": '""', "fields": '["a"]', "t": "[1,2]", "columns": "[[1, null]]"}
    accepted, refused = (
        zlib.compress(b"{" + ",".join(f'"{name}":{value}' for name, value in each.items()).encode() + b"}")
        for each in (valid, {**valid, **members})
    )
    assert sample_content.decode(accepted, 2).columns[0].tolist()[0] == 1.0
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason):
            sample_content.decode(refused, 2)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_both_databases_give_the_same_set(fresh: Callable[[], FleetStore]) -> None:
    sender, key = MessageSender(task=TASK), X25519PrivateKey.from_private_bytes(bytes(range(32)))
    content = {"v": 1, "consent": "yes", "fields": ["a"], "t": [10, 5], "columns": [[1.5, None]]}
    sealed = forge(sender, encryption_key_of(key), zlib.compress(json.dumps(content).encode()), rows=[1, 2], n=2)
    columns = {"row": [1], "t": [10], "label": ["PEN"], "score": [0.5]}
    sent = [
        sender.alert("tiny/a/fault/1"),
        sender.drift(),
        sender.results(1, rows_at=(1, 2), columns=columns),
    ]
    store = fresh()
    store.enrol(sender.device, sender.key.public, replace=False, now=BEFORE)
    reordered = [sender.verify(item) for item in (sealed, *sent, again(sender, sealed))]
    store.ingest([Arrival(message) for message in reordered], [], BEFORE)
    with store.transaction() as db:
        given_labels.add(db, sender.device, TASK, [Label(1, None, "PEN")], BEFORE, "mira")
    selection = Selection(FLEET, TASK, BEFORE, "0001", "9999")
    with store.snapshot() as db:
        gathered = gather.gather(db, selection, Opener([key]))
    [recording] = gathered.recordings
    assert (gathered.fields, dict(gathered.left_out)) == (["a"], {"duplicate": 1})
    assert recording.t.tolist() == [10, 15]
    assert recording.samples[0]["drift"] is None
    assert [(each.row, each.label, each.by) for each in recording.get_output("").labels] == [(1, "PEN", ("mira",))]
    assert samples.count(store, sender.device)[0].samples == 2
    assert len(samples.list_newest(store, sender.device, TASK, 5)) == 2
    store.close()


def test_a_field_with_the_name_of_a_label_column_is_refused() -> None:
    labelled = {"wear": LabelledOutput([RowLabel(1, "worn", "", ("human",), ("mira",), 1)])}
    recording = Recording("pi-07", "log", 1, np.array([10]), np.array([[1.5]]), [], labelled)
    with pytest.raises(UsageError, match="field 'label_wear', so the labels of output 'wear'"):
        data_files.build(Gathered(["label_wear"], [recording]), None, "csv")
    header = data_files.build(Gathered(["wear"], [recording]), None, "csv")["data.csv"].decode().splitlines()[0]
    assert header == "t,wear,label,label_wear,device,recording,source"


def again(sender: MessageSender, sent: SignedMessage) -> SignedMessage:
    """Return the same sealed readings in another message, as a new log repeats them."""
    return sender.samples(json.loads(sent.payload)["sealed"], row=1, rows=[1, 2], n=2)


def forge(sender: MessageSender, key: EncryptionKey, content: bytes, **changes: Any) -> SignedMessage:
    topic = f"outstation/{FLEET}/{sender.device}/samples/{sender.task}"
    sealed = b64url_encode(sealing.seal_content(key, topic, content))
    return sender.samples(sealed, **{"row": 1, "rows": [1, 1], "n": 1, **changes})
