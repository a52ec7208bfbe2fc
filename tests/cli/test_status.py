"""Command `outstation status`: open alerts, the site reference and label metrics of each task."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from typing import Any

import pytest
from click.testing import CliRunner

from outstation.device.bootstrap.device import open_message_log
from outstation.device.cli.reply import print_reply
from outstation.device.intake import label_intake
from outstation.device.pipeline import label_metrics, labelled_output
from outstation.device.status import build_document
from outstation.device.store.store import DATABASE, Store
from outstation.foundation.cli.commands import cli
from outstation.foundation.errors import StorageDamaged, StorageError, UsageError
from outstation.ml.performance.labels import Label
from outstation.workbench.testing.process import run_outstation
from tests.device.pipeline.test_relearn import NOW, Site, work
from tests.kit.commands import call_outstation


def alert(store: Store, site: Site, kind: str, subject: str, state: str, summary: str) -> None:
    author = open_message_log(site.file, site.conf, store)
    body: dict[str, Any] = {
        "alert": kind,
        "subject": subject,
        "state": state,
        "severity": "warning",
        "summary": summary,
        "id": f"exercise/{subject}/{kind}/1",
        "evidence": {},
    }
    with store.transaction() as tx:
        author.append(tx, "alerts", "exercise", body, NOW)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """One that is learning, with labels, an open drift and fault, and many other alerts since."""
    made = Site(tmp_path_factory.mktemp("status"))
    with made.open() as store:
        task = work(made, store, 3)
        alert(store, made, "drift", "ax", "raised", "ax: spread fell to 0.6 of the reference.")
        alert(store, made, "fault", "wz", "raised", "wz: repeats one value.")
        alert(store, made, "drift", "ay", "raised", "ay: rose.")
        alert(store, made, "drift", "ay", "cleared", "ay: close to this site's reference.")
        for i in range(1100):
            alert(store, made, "storage", f"watch{i}", "raised", "rows cannot be read back.")
        with store.transaction() as tx:
            for row in range(100, 6100, 100):
                target = labelled_output.build_label_targets([task])["exercise"]
                assert label_intake.store_label(tx, "exercise", target, Label(row, None, "PEN"), NOW) is None
        label_metrics.tick(task, store, open_message_log(made.file, made.conf, store), NOW, 86_400.0)
    return made


def test_open_alerts_stay_in_sight_after_many_others(site: Site) -> None:
    done = call_outstation("status", "-c", str(site.config), "--json")
    document = json.loads(done.stdout)
    [task] = document["tasks"]
    alerts = [
        (alert["alert"], alert["subject"], alert["summary"]) for alert in task["open"] if alert["alert"] != "quality"
    ]
    assert alerts == [
        ("drift", "ax", "ax: spread fell to 0.6 of the reference."),
        ("fault", "wz", "wz: repeats one value."),
    ]
    assert {alert["alert"] for alert in document["alerts"]} <= {"storage", "quality"}
    seconds = task["reference"]["learning"]["seconds"]
    assert seconds > 0
    assert task["reference"] == {
        "site": None,
        "learning": {"windows": 3, "of": 20, "for_s": 0.0, "seconds": seconds, "times": 4.0},
        "warning": None,
    }
    assert {"accuracy", "ece"} <= {alert["metric"] for alert in task["quality"]["metrics"]}


def test_people_read_the_same(site: Site) -> None:
    text = call_outstation("status", "-c", str(site.config)).stdout
    for line in (
        "open drift  ax: spread fell to 0.6 of the reference.",
        "open fault  wz: repeats one value.",
        "learning its reference: 3 of at least 20, at most 80 drift windows, about ",
        "by labels of 60 results (",
        "raised exercise  rows cannot be read back.",
    ):
        assert line in text, text
    assert "open drift  ay" not in text
    assert " to " in text.split("accuracy ")[1].split(",")[0]


@pytest.mark.parametrize("columns", [66, 80])
def test_sentences_are_wrapped_to_the_terminal_and_shown_once(
    site: Site, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = call_outstation("status", "-c", str(site.config)).stdout
    assert max(map(len, text.splitlines())) <= columns, max(text.splitlines(), key=len)
    assert " ".join(text.split()).count("ax: spread fell to 0.6 of the reference.") == 1


def test_a_reference_learned_from_few_windows_is_warned_of(site: Site) -> None:
    with site.open() as store:
        work(site, store, 19)
    text = call_outstation("status", "-c", str(site.config)).stdout
    assert "reference: warning: only 20 drift windows" in " ".join(text.split())
    assert "learning its reference" not in text
    assert re.search(r"  found within 20 drift windows, 90% of the time:\n    \w\w ±", text)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A device without a store."""
    return Site(tmp_path_factory.mktemp("new"))


@pytest.mark.parametrize("command", ["status", "cost", "drift exercise", "reference show exercise"])
def test_a_store_that_is_damaged_or_cannot_be_opened_is_not_called_missing(new: Site, command: str) -> None:
    database = new.conf.data_dir / DATABASE

    def error() -> BaseException | None:
        return CliRunner().invoke(cli, [*command.split(), "-c", str(new.config)]).exception

    missing = f"{new.conf.data_dir}: no store here yet; start `outstation run`, or ingest something"
    assert isinstance(error(), UsageError)
    assert str(error()) == missing
    new.conf.data_dir.mkdir(exist_ok=True)
    database.write_bytes(b"x" * 8192)
    assert isinstance(error(), StorageDamaged)
    assert str(error()).startswith(f"{database}: file is not a database; ")
    database.unlink()
    database.mkdir()
    assert isinstance(error(), StorageError)
    assert str(error()).startswith(f"{database}: is a folder, where a file is needed; ")
    database.rmdir()


def test_a_store_that_another_process_has_locked_is_not_called_missing(new: Site) -> None:
    new.open().close()
    with contextlib.closing(sqlite3.connect(new.conf.data_dir / DATABASE, isolation_level=None)) as holder:
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        done = run_outstation("status", "-c", str(new.config))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"outstation: {new.conf.data_dir / DATABASE}: locked by another process\n"


def test_a_report_to_an_operator_is_shown_as_the_status_command_shows_it(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store.open_read_only(site.conf.data_dir) as store:
        document = json.loads(json.dumps(build_document(site.conf, store)))
    print_reply("report", document)
    text = capsys.readouterr().out
    assert text.startswith(f"{site.conf.device.id} in fleet {site.conf.device.fleet}, boot ")
    assert "open fault  wz: repeats one value." in text
    # Values of readings do not leave the device.
    assert all("values" not in stream["last"] for stream in document["streams"])
