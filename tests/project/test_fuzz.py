"""Every decoder under damaged bytes, briefly and reproducibly; `scripts/fuzz` runs longer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from scripts import fuzzing
from scripts.fuzzing import TARGETS, Target, __main__, explore
from scripts.fuzzing.explore import attempt

ALL = fuzzing.load()
# After the sound bytes of each target.
RUNS, COSTLY_RUNS = 100, 4


@pytest.mark.parametrize("name", ALL)
def test_damaged_bytes_break_no_decoder(name: str) -> None:
    if name == "parquet":
        pytest.importorskip("pyarrow")
    runs = COSTLY_RUNS if ALL[name].costly else RUNS
    sound = ALL[name].seeds()
    exploration = explore.explore(ALL[name], seed=1, runs=len(sound) + runs)
    assert exploration.runs == len(sound) + runs
    assert [crash.trace for crash in exploration.crashes.values()] == []
    reached: set[tuple[str, int]] = set()
    attempt(ALL[name], sound[0], reached)
    assert len(reached) > 10, "sound bytes do not reach the decoder"


def reads(data: bytes) -> None:
    """Decode with a planted fault: only some digits are accepted."""
    if b"9" in data:
        raise KeyError("nine")
    if b"8" in data:
        raise OSError("eight")


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.fixture
def faulty() -> Iterator[Target]:
    broken = Target("faulty", "a decoder with two faults", lambda: [b'{"a":1}'], reads, 100)
    TARGETS[broken.name] = broken
    yield broken
    del TARGETS[broken.name]


def test_each_crash_is_reported_once_with_the_same_input_for_a_seed(faulty: Target) -> None:
    first, again = (explore.explore(faulty, seed=3, runs=2000) for _ in range(2))
    assert sorted(place.split()[0] for place in first.crashes) == ["KeyError", "OSError"]
    assert {c.data for c in first.crashes.values()} == {c.data for c in again.crashes.values()}
    other = explore.explore(faulty, seed=4, runs=2000)
    assert {c.data for c in other.crashes.values()} != {c.data for c in first.crashes.values()}


def test_a_decoder_that_takes_too_long_is_a_finding(faulty: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explore, "SLOW_S", 0.01)
    crash = attempt(Target("slow", "", faulty.seeds, lambda data: burn(0.02), 100), b"x")
    assert crash is not None
    assert "TooSlow" in crash.place


def test_a_crash_is_in_a_file_with_the_command_that_shows_it_again(
    faulty: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__main__, "FOLDER", tmp_path)
    run = CliRunner()
    ended = run.invoke(__main__.main, ["faulty", "--plain", "--seconds", "1"])
    assert ended.exit_code == 1
    texts = sorted((tmp_path / "crashes").glob("faulty-*.txt"))
    assert len(texts) == 2
    for text in texts:
        [command] = [line for line in text.read_text().splitlines() if line.startswith("Again: scripts/fuzz ")]
        shown = run.invoke(__main__.main, command.split()[2:])
        assert shown.exit_code == 1
        assert "Traceback" in shown.output


def test_the_command_lists_its_targets_and_names_one_that_is_not_there() -> None:
    listed = CliRunner().invoke(__main__.main, ["--list"])
    assert [line.split()[0] for line in listed.output.splitlines()] == list(ALL)
    wrong = CliRunner().invoke(__main__.main, ["nothing"])
    assert wrong.exit_code == 2
    assert "no target is named 'nothing'; use one of ack" in wrong.output
