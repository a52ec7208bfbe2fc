"""Journal in the support archive: the program's words are there, and no value of a line is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import outstation
from outstation.device.cli.doctor import journal

T0 = 1_764_022_680_000_000
PLANTED = ("patient-zq7", "0.7351129", "/srv/ward-9", "10.1.2.3", "bed-qx71.csv", "nurse")
LINES = [
    ("1", "outstation.service: Main process exited, code=killed, status=9/KILL"),
    ("77", "WARNING mqtt://10.1.2.3: Connection refused; trying again until it works"),
    ("77", "WARNING mqtt://10.1.2.3: Connection refused; trying again until it works"),
    ("77", "ERROR bed-qx71.csv: cannot be moved: No space left; it stays where it is"),
    ("77", "CRITICAL patient-zq7: rose to 0.7351129 in /srv/ward-9"),
    ("77", "nurse: patient-zq7"),
    (
        "77",
        "ERROR not reloaded, the config before is in force again: /srv/ward-9: must be between 0 s and 3650 d",
    ),
]


@pytest.mark.attack("privacy")
def test_a_line_of_the_journal_is_the_programs_text_without_its_values() -> None:
    lines = [
        json.dumps({"__REALTIME_TIMESTAMP": str(T0 + i), "_PID": pid, "PRIORITY": "4", "MESSAGE": text}).encode()
        for i, (pid, text) in enumerate(LINES)
    ]
    package = Path(outstation.__file__).parent
    folders = ("integrations", "device/intake/sources", "device/bootstrap", "device/config", "device/cli")
    texts = [text for folder in folders for text in journal.load_texts(package / folder)]
    entries = journal.summarize([*lines, b"{", b'{"MESSAGE": [1, 2]}'], texts)
    shown = [entry.text for entry in entries]
    assert [value for value in PLANTED if any(value in text for text in shown)] == []
    assert shown[0] == LINES[0][1]
    assert (shown[1], entries[1].lines, entries[1].last_us) == ("…: …; trying again until it works", 2, T0 + 2)
    assert shown[2] == "…: cannot be moved: …; it stays where it is"
    assert shown[3] == "…: …"
    assert shown[-1].startswith("not reloaded, the config before is in force again: ")
    assert shown[-1].endswith("must be between 0 s and 3650 d")


@pytest.mark.process
def test_without_journalctl_the_archive_says_why_the_journal_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert journal.read() == {"left_out": "this machine has no journalctl"}
