"""Command `outstation drift`: drift from the device's own store."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outstation.device.bootstrap import tasks
from outstation.device.bootstrap.device import open_message_log, open_store
from outstation.device.pipeline import batch
from outstation.device.store.rows import Rows
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from tests.kit.commands import call_outstation
from tests.kit.learning_device import LearningDevice

NOW = ClockReading(1_795_000_000_000_000, 1000.0, "synced")
SVG = "{http://www.w3.org/2000/svg}"


class Site(LearningDevice):
    def ask(self, *arguments: str) -> tuple[int, Any]:
        return self.call("drift", "exercise", *arguments)

    def work(self, drift_windows: int, gain: float = 1.0) -> None:
        """Readings for so many drift windows, noise, of which `ax` is multiplied."""
        with open_store(self.conf) as store:
            first, n = store.last_row("watch"), drift_windows * 2000
            rng = np.random.default_rng(first)
            t = NOW.wall_us + 20_000 * np.arange(first, first + n, dtype=np.int64)
            columns = [rng.normal(0, 0.2 * (gain if i == 0 else 1), n).astype("<f4") for i in range(6)]
            with store.transaction() as tx:
                tx.append("watch", Rows(t, tuple(columns)), "synced")
            author = open_message_log(self.file, self.conf, store)
            task = tasks.load_task(self.file, self.conf, store, "exercise")
            while batch.run(task, store, author, NOW) is not None:
                pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """One that learned what is normal, and whose first field then lost gain."""
    made = Site(tmp_path_factory.mktemp("site"))
    made.work(24)
    made.work(8, gain=0.5)
    return made


def test_a_device_that_has_no_drift_window_yet_says_so(tmp_path: Path) -> None:
    new = Site(tmp_path)
    assert new.ask() == (2, f"outstation: {new.data}: no store here yet; start `outstation run`, or ingest something\n")
    open_store(new.conf).close()
    code, document = new.ask("--plot", str(tmp_path / "drift.svg"))
    assert (code, document["windows"], document["subjects"], document["estimate"]) == (0, 0, [], None)
    text = [element.text for element in ET.parse(tmp_path / "drift.svg").iter(f"{SVG}text")]
    assert any(str(line).startswith("No drift window yet") for line in text)


def test_the_drifting_field_is_shown_with_its_onset_and_distance(site: Site) -> None:
    code, document = site.ask()
    assert code == 0, document
    assert (document["device"], document["task"], document["windows"], document["unreadable"]) == (
        "pi-07",
        "exercise",
        32,
        0,
    )
    by_subject = {subject["subject"]: subject for subject in document["subjects"]}
    assert {"ax", "ay", "az", "wx", "wy", "wz"} <= set(by_subject)
    ax = by_subject["ax"]
    assert (ax["state"], ax["since"] is not None) == ("drift", True)
    assert ax["cusum"]["spread"] > ax["cusum"]["limit"] > 0
    assert ax["sizes"]["ks"] > 0.1
    assert [alert["summary"].startswith("ax: spread fell") for alert in document["alerts"] if alert["alert"] == "drift"]


def test_its_picture_shows_the_reference_the_alarm_line_and_the_alert(site: Site, tmp_path: Path) -> None:
    code, document = site.ask("--plot", str(tmp_path / "drift.svg"), "--dark")
    assert (code, document["plot"]) == (0, str(tmp_path / "drift.svg"))
    root = ET.parse(tmp_path / "drift.svg").getroot()
    classes = [element.get("class", "") for element in root.iter()]
    text = [element.text for element in root.iter(f"{SVG}text")]
    assert {"ax", "wz"} <= {str(line).split(" ")[0] for line in text}
    assert "this site's reference" in text
    assert classes.count("usual") == 6
    assert classes.count("limit") >= 6
    assert classes.count("raised") >= 1
    assert {path.name for path in tmp_path.iterdir()} == {"drift.svg"}


def test_messages_of_another_task_are_not_taken_for_its_own(site: Site) -> None:
    with Store.open_read_only(site.data, max_size=int(site.conf.buffer.max_size)) as store:
        recent = store.recent_messages("drift", "exercise", 5)
        assert [message.topic.split("/")[3:] for message in recent] == [["drift", "exercise"]] * 5
        assert [message.seq for message in recent] == sorted(message.seq for message in recent)
        assert store.recent_messages("drift", "ercise", 5) == []


def test_a_message_that_was_damaged_on_the_disk_is_left_out_and_counted(site: Site, tmp_path: Path) -> None:
    shutil.copytree(site.home, tmp_path / "device")
    copy = tmp_path / "device" / "outstation.toml"
    copy.write_text(
        copy.read_text(encoding="utf-8").replace(str(site.home), str(tmp_path / "device")), encoding="utf-8"
    )
    [file] = (tmp_path / "device").rglob("*.db")
    with contextlib.closing(sqlite3.connect(file)) as db, db:
        db.execute(
            "UPDATE outbox SET payload = replace(payload, '\"n\":2000', '\"n\":2001')"
            " WHERE seq = (SELECT max(seq) FROM outbox WHERE topic LIKE '%/drift/exercise')"
        )
    done = call_outstation("drift", "exercise", "-c", str(copy), "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["windows"], document["unreadable"]) == (31, 1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["--plot", "drift.pdf"], "ends in .svg or .png"), (["--plot", "/nowhere/drift.svg"], "cannot be written")],
)
def test_a_file_that_cannot_be_drawn_is_refused_with_the_reason(site: Site, arguments: list[str], reason: str) -> None:
    code, answer = site.ask(*arguments)
    assert code == 2
    assert reason in answer
    assert answer.count("\n") == 1
