"""`outstation init --from`: a stream that takes the rows it was proposed from."""

from __future__ import annotations

import json
import math
import shlex
import threading
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outstation.__main__ import main
from outstation.device import config
from outstation.device.cli.proposal.fields import propose_columns
from outstation.device.config.sources import MqttSource
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import OutgoingMessage
from outstation.workbench.testing.broker import MosquittoBroker
from tests.kit.commands import call_outstation

GREENHOUSE = """\
Zeit;Temperatur °C;hum;Raum;Notiz
2026-11-27 10:00:00;21,5;40;Küche;
2026-11-27 10:01:00;22,5;41;Bad;
2026-11-27 10:02:00;22;45;Bad;
"""


def test_the_stream_proposed_from_a_file_takes_the_file_by_the_command_that_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "greenhouse.csv").write_text(GREENHOUSE)
    monkeypatch.chdir(tmp_path)
    done = call_outstation("init", "--from", "greenhouse.csv", "--json")
    assert done.returncode == 0, done.stderr
    notes = json.loads(done.stdout)["notes"]
    stream = config.load(Path("outstation.toml")).streams["greenhouse"]
    assert [(f.name, f.type, f.unit) for f in stream.fields] == [
        ("temperatur_c", "f32", "°C"),
        ("hum", "f32", "%"),
        ("raum", "category", ""),
    ]
    [command] = [note.removeprefix("Add the file: ") for note in notes if note.startswith("Add the file: ")]
    done = call_outstation(*shlex.split(command)[1:], "--json")
    assert (done.returncode, json.loads(done.stdout)["accepted"]) == (0, 3), done.stderr


def publish(broker: MosquittoBroker, messages: list[tuple[str, Any]], stop: threading.Event) -> None:
    with Link(BrokerConfig(url=broker.url), "sensor") as link:
        while not stop.wait(0.1):
            for topic, payload in messages:
                encoded = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                link.send(OutgoingMessage(topic, encoded))
            link.receive(0.05)


def test_a_stream_is_proposed_from_messages_of_a_broker_with_paths_and_levels_of_the_topic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two rounds of the messages end it.
    monkeypatch.setattr("outstation.device.cli.proposal.stream._MAX_MESSAGES", 6)
    head = {"Time": "2026-11-27T10:00:00", "on": True}
    messages: list[tuple[str, Any]] = [
        ("tele/attic/SENSOR", {**head, "AM2301": {"Temperature": 20.1, "Humidity": 40}}),
        ("tele/cellar/SENSOR", {**head, "AM2301": {"Temperature": 9.5, "Humidity": 80}}),
        ("tele/cellar/SENSOR", b"offline"),
    ]
    stop = threading.Event()
    with MosquittoBroker(tmp_path) as broker:
        thread = threading.Thread(target=publish, args=(broker, messages, stop))
        thread.start()
        try:
            options = ["--from", broker.url, "--topic", "tele/+/SENSOR"]
            done = call_outstation("init", str(tmp_path / "pi"), *options)
        finally:
            stop.set()
            thread.join()
    assert done.returncode == 0, done.stderr
    stream = config.load(tmp_path / "pi" / "outstation.toml").streams["sensor"]
    assert isinstance(stream.source, MqttSource)
    assert stream.source.topic == "tele/+/SENSOR"
    assert stream.source.paths == {
        "am2301_temperature": "$.AM2301.Temperature",
        "am2301_humidity": "$.AM2301.Humidity",
        "topic_1": "topic[1]",
    }
    assert [(f.name, f.unit, f.min, f.max) for f in stream.fields[:2]] == [
        ("am2301_temperature", "°C", -60, 150),
        ("am2301_humidity", "%", 0, 100),
    ]
    assert stream.fields[2].type == "category"


def test_a_topic_without_readings_ends_with_what_to_do(tmp_path: Path) -> None:
    with MosquittoBroker(tmp_path) as broker:
        options = ["--from", broker.url, "--topic", "none/+", "--listen", "1 s"]
        done = call_outstation("init", str(tmp_path / "pi"), *options)
    assert done.returncode == 2
    assert "no reading came within 1 s" in done.stderr
    assert not (tmp_path / "pi").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "mqtt://127.0.0.1"], "--topic and --from mqtt://HOST belong together"),
        (["--topic", "a/b"], "--topic and --from mqtt://HOST belong together"),
        (["--from", "mqtt://u:secret@127.0.0.1", "--topic", "a"], "holds credentials"),
        (["--from", "empty.csv"], "there is no row in it"),
        (["--from", "none.csv"], "none.csv"),
    ],
)
def test_sources_that_propose_nothing_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    (tmp_path / "empty.csv").write_text("a,b\n")
    monkeypatch.chdir(tmp_path)
    done = call_outstation("init", "pi", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "secret" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_each_kind_of_column_is_recognized() -> None:
    columns = propose_columns(
        {
            "ts": [1_764_000_000, 1_764_000_001],
            "count": [1, 2**30],
            "rssi": [-60, None],
            "flag": [True, False],
            "id": ["a", "b"],
            "nothing": [None, ""],
            "t": ["1764000000", "1764000001"],
            "stream": [1.0, 1.0],
        }
    )
    assert columns.time == "ts"
    assert [(f.name, f.type, f.optional) for f in columns.fields] == [
        ("count", "f64", False),
        ("rssi", "f32", True),
        ("id", "category", False),
        ("f_stream", "f32", False),
    ]
    assert columns.fields[3].min is None
    assert len(columns.notes) == 3


def test_limits_that_are_proposed_take_the_rows_they_were_proposed_from() -> None:
    samples = {
        "meter": [12345740.0, 12345742.0],
        "single": [12345740.6, 12345740.7],
        "huge": [-1e308, 1e308],
        "tiny": [0.0, 5e-324],
        "": [1.0, 2.0],
    }
    columns = propose_columns(samples)
    assert [f.name for f in columns.fields] == ["meter", "single", "huge", "tiny"]
    for field in columns.fields:
        limits = tomllib.loads(f"field = {field.to_toml()}")["field"]
        seen = np.array(samples[field.place], np.float64 if field.type == "f64" else np.float32).astype(float)
        assert limits.get("min", -math.inf) <= seen.min(), field
        assert seen.max() <= limits.get("max", math.inf), field
    assert columns.fields[2].max is None
    assert columns.notes == ["a column without a name is left out"]


def test_a_table_of_too_many_columns_leaves_no_config_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "wide.csv"
    table.write_text("".join(f"{','.join(f'{kind}{n}' for n in range(7_000))}\n" for kind in ("c", "")))
    with pytest.raises(SystemExit) as ended:
        main(["init", str(tmp_path / "pi"), "--from", str(table)])
    assert ended.value.code == 2
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "pi").exists()
