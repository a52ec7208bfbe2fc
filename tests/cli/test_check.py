"""Command `outstation check`: it fails where `outstation run` would not start, and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outstation.device import config
from outstation.device.intake import feedback_loops
from outstation.device.store.store import Store
from outstation.workbench.testing.fleet import RECORDINGS
from outstation.workbench.testing.process import run_outstation
from tests.kit.commands import call_outstation

HOST = """
[streams.watch]
fields = [{{ name = "{field}" }}]
source = {{ kind = "host", poll_interval = "1 s" }}
"""
REPLAY = """
[streams.watch]
fields = [{{ name = "{field}" }}]
source = {{ kind = "replay", file = "{file}"{more} }}
"""


def device(folder: Path, stream: str) -> Path:
    """Its config; a broker is not needed by what is asked here."""
    assert call_outstation("init", str(folder), "--id", "pi-07").returncode == 0
    file = folder / "outstation.toml"
    file.write_text(
        f'[device]\nid = "pi-07"\nfleet = "acme"\ndata_dir = "data"\n\n[collector]\ndelivery = "broker"\n{stream}'
    )
    return file


def finding(file: Path) -> tuple[int, dict[str, str]]:
    """The exit code of the check, and what it says of the stream."""
    done = call_outstation("check", "-c", str(file), "--json")
    [result] = [check for check in json.loads(done.stdout) if check["name"] == "stream watch"]
    return done.returncode, result


def test_a_disk_that_cannot_hold_the_store_is_a_warning(tmp_path: Path) -> None:
    file = device(tmp_path, "")
    for limit, state in (("64 MiB", "ok"), ("900 TiB", "warning")):
        file.write_text(file.read_text().partition("[buffer]")[0] + f'[buffer]\nmax_size = "{limit}"\n')
        results = json.loads(call_outstation("check", "-c", str(file), "--json").stdout)
        [check] = [check for check in results if check["name"] == "storage"]
        assert (check["state"], "lower [buffer] max_size" in check["detail"]) == (state, state == "warning")


def test_files_that_the_watcher_of_a_folder_leaves_unread_are_counted(tmp_path: Path) -> None:
    file = device(tmp_path, '[streams.watch]\nfields = [{ name = "a" }]\nsource = { kind = "files", folder = "in" }\n')
    assert finding(file)[1]["detail"] == f"tables, of the files in {tmp_path / 'in'}"
    (tmp_path / "in").mkdir()
    for name in ("a.csv", "b.CSV", ".hidden", "c.csv.gz", "d.txt"):
        (tmp_path / "in" / name).write_text("a\n1\n")
    assert ".jsonl, .ndjson, .parquet; 2 stay there unread, such as c.csv.gz" in finding(file)[1]["detail"]


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (HOST.format(field="memroy"), "the host has no 'memroy'; did you mean 'memory'?"),
        (REPLAY.format(field="ax", file="nowhere.npz", more=""), "nowhere.npz: cannot be read"),
        (REPLAY.format(field="heat", file=RECORDINGS, more=""), "has no heat; it has ax"),
        (REPLAY.format(field="ax", file=RECORDINGS, more=", subject = 999"), "the recordings have no subject 999"),
        (REPLAY.format(field="ax", file=RECORDINGS, more=", skip = 5"), "skip = 5: the recordings have no times"),
    ],
    ids=["host without the field", "no file", "no such field", "no such subject", "nothing to skip"],
)
def test_a_source_that_the_daemon_would_refuse_fails_the_check(tmp_path: Path, stream: str, message: str) -> None:
    file = device(tmp_path, stream)
    code, check = finding(file)
    assert (code, check["state"]) == (2, "failed")
    assert message in check["detail"]
    refused = run_outstation("run", "-c", str(file))
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == f"outstation: {check['detail']}"


def test_a_valid_source_is_reported_and_its_replay_does_not_start(tmp_path: Path) -> None:
    _, check = finding(device(tmp_path / "a", HOST.format(field="memory")))
    assert (check["state"], check["detail"]) == ("ok", "memory of this machine")
    file = device(tmp_path / "b", REPLAY.format(field="ax", file=RECORDINGS, more=""))
    _, check = finding(file)
    assert check["state"] == "ok"
    assert check["detail"].startswith("a replay of the ")
    store = Store.open_read_only(config.load(file).data_dir)
    assert store.source_position("replay:watch", "begin") == 0
    store.close()


def test_a_schedule_that_has_ended_is_a_warning(tmp_path: Path) -> None:
    task = '[tasks.exercise]\nstream = "watch"\nbundle = "exercise"\nschedule = "{}"\n'
    states = []
    for i, text in enumerate(
        ("every 60 s until 2020-01-01 or 0 6 * * * until 2021-01-01", "0 6 * * * until 2020-01-01 or every 60 s")
    ):
        file = device(tmp_path / str(i), HOST.format(field="memory") + task.format(text))
        checks = json.loads(call_outstation("check", "-c", str(file), "--json").stdout)
        states += [check["state"] for check in checks if check["name"] == "schedule exercise"]
    assert states == ["warning", "ok"]


@pytest.mark.parametrize(
    ("key", "state", "words"),
    [
        ("", "failed", "collector.encryption_key: empty: [privacy] encrypt seals messages to it"),
        ("A" * 43, "failed", "of small order: anybody can open what is sealed to it"),
        ("CQ" + "A" * 41, "ok", "messages are sealed to "),
    ],
)
def test_the_key_that_messages_are_sealed_to_is_checked(tmp_path: Path, key: str, state: str, words: str) -> None:
    file = device(tmp_path, HOST.format(field="memory"))
    text = file.read_text(encoding="utf-8").replace('"broker"', f'"broker"\nencryption_key = "{key}"')
    file.write_text(f"{text}[privacy]\nencrypt = true\n", encoding="utf-8")
    done = call_outstation("check", "-c", str(file), "--json")
    [check] = [check for check in json.loads(done.stdout) if check["name"] == "encryption"]
    assert (check["state"], words in check["detail"]) == (state, True)
    if state == "failed":
        refused = run_outstation("run", "-c", str(file))
        assert (refused.returncode, words in refused.stderr) == (2, True)


def test_a_damaged_encryption_key_is_refused_although_nothing_is_sealed_to_it_yet(tmp_path: Path) -> None:
    file = device(tmp_path, HOST.format(field="memory"))
    file.write_text(file.read_text(encoding="utf-8").replace('"broker"', '"broker"\nencryption_key = "x"'))
    for done in (call_outstation("check", "-c", str(file)), call_outstation("run", "-c", str(file))):
        assert (done.returncode, "collector.encryption_key: not a key" in done.stdout + done.stderr) == (2, True)


LOOP = """
[streams.watch]
fields = [{{ name = "ax" }}]
source = {{ kind = "mqtt", topic = "{topic}", paths = {{ ax = "$.score" }} }}
[tasks.exercise]
stream = "watch"
bundle = "exercise"
"""


@pytest.mark.parametrize(
    ("topic", "is_loop"),
    [
        ("outstation/acme/pi-07/results/exercise", True),
        ("outstation/acme/+/results/#", True),
        ("outstation-bridge/acme/latest/pi-07/exercise", True),
        ("#", True),
        ("outstation/acme/pi-08/results/exercise", False),
        ("outstation/acme/pi-07/drift/exercise", False),
        ("plant/pump/1", False),
    ],
)
def test_a_stream_that_reads_the_tasks_own_results_is_a_feedback_loop(
    tmp_path: Path, topic: str, is_loop: bool
) -> None:
    conf = config.load(device(tmp_path, LOOP.format(topic=topic)))
    assert [loop.readers for loop in feedback_loops.find(conf)] == ([("exercise",)] if is_loop else [])
    if is_loop:
        [loop] = feedback_loops.find(conf)
        assert "its answers become its own input" in loop.summary
