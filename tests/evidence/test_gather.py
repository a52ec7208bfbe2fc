"""Evidence folder: content, omissions, and all-or-nothing writing."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from outstation.evidence import make
from outstation.evidence.format import frameworks
from outstation.evidence.format.contents import WriteLimits
from outstation.evidence.gather import sbom
from outstation.evidence.gather.incidents import IncidentCollector
from outstation.evidence.page.formats import format_duration
from outstation.evidence.verify.verify import verify
from outstation.fleet.cli.group import fleet
from outstation.foundation.errors import BadBundle, UsageError
from outstation.ml.performance.estimates import MetricEstimate
from outstation.workbench.evaluation.document import EvaluatedModel, Evaluation, EvaluationData, SourceFile
from outstation.workbench.testing.messages import MessageSender, new_key
from scripts.kit.bundles import resign
from tests.kit.evidences import EXERCISE, Story, activated, alert, at, build_story, health

LATER = at(200)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    story = build_story(tmp_path_factory.mktemp("story") / "acme")
    yield story
    story.store.close()


@pytest.fixture(scope="module")
def folder(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evidence") / "acme-2026-11"
    story.make(out)
    return out


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Story]:
    """Yield a fleet of two devices that a test may change."""
    story = Story.begin(tmp_path / "acme")
    for number in (1, 2):
        sender = story.device(f"pi-0{number}", number)
        story.collect(sender, activated(story, sender, 0), health(story, sender, 1), hours=1)
    yield story
    story.store.close()


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(fleet, ["evidence", *[str(arg) for arg in args]])


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def text_of(folder: Path) -> str:
    """Return the text of the page without markup."""
    return html.unescape(
        " ".join(re.sub(r"<[^>]+>", " ", (folder / "index.html").read_text().split("</style>")[1]).split())
    )


def test_a_copy_verifies_with_only_the_folder_and_the_key(story: Story, folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    subprocess.run(["cp", "-r", str(folder), str(alone / "received")], check=True)
    command = [sys.executable, "-P", "-m", "outstation", "fleet", "evidence", "verify", "received", "--json"]
    done = subprocess.run(
        [*command, "--operator", story.operator.public.text],
        cwd=alone,
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["ok"], report["problems"], report["fleet"], report["signer"]) == (
        True, [], "acme", story.operator.public.kid,
    )  # fmt: skip
    assert report["files"] == len(read_files(folder)) - 2
    assert (report["decisions"], report["bundles"], report["unsupported"]) == (27, 2, 0)
    assert report["messages"] == len(read_lines(folder / "messages" / "part-0001.jsonl")) > 20


def test_equal_database_and_time_give_equal_bytes(story: Story, folder: Path, tmp_path: Path) -> None:
    story.make(tmp_path / "again")
    assert read_files(tmp_path / "again") == read_files(folder)


def test_incidents_have_durations_and_refer_to_messages(folder: Path) -> None:
    documents = json.loads((folder / "incidents.json").read_text())
    incidents = {incident["subject"]: incident for incident in documents}
    drift, fault, storage = incidents["ax"], incidents["wy"], incidents["disk"]
    assert (drift["state"], drift["seconds"], drift["device"]) == ("closed", 24.5 * 3600, "pi-01")
    assert drift["raised"]["seq"] < drift["cleared"]["seq"]
    # The duration of an open incident ends at the newest message.
    assert (fault["state"], fault["seconds"], fault["ended"]) == ("open", 66 * 3600, None)
    assert (storage["state"], storage["clock"]) == ("closed", "unsynced")
    rows = list(csv.DictReader(io.StringIO((folder / "incidents.csv").read_text())))
    assert [row["severity"] for row in rows] == ["critical", "warning", "info"]


def test_running_tasks_have_start_and_actor(folder: Path) -> None:
    tasks = json.loads((folder / "running.json").read_text())
    assert [task["device"] for task in tasks] == ["pi-01", "pi-02", "pi-03", "pi-04"]
    assert [task["model"]["version"] for task in tasks] == ["1.1.0", "1.1.0", "1.0.0", "1.1.0"]
    assert [task["decided_by"] for task in tasks[1:3]] == ["an operator, by a roll-out", "an operator, by command"]
    assert [task["since"] for task in tasks[1:3]] == [at(81.1), at(96)]
    assert {task["agent"] for task in tasks} == {"0.1.0"}
    history = {usage["model"]["version"]: usage for usage in json.loads((folder / "history.json").read_text())}
    names = ("activations", "devices", "running_tasks")
    assert [history["1.0.0"][name] for name in names] == [5, 4, 1]
    assert [history["1.1.0"][name] for name in names] == [4, 4, 3]


def test_decisions_name_their_actor_and_carry_operator_signatures(story: Story, folder: Path) -> None:
    decisions = read_lines(folder / "decisions.jsonl")
    assert [record["time"] for record in decisions] == sorted(record["time"] for record in decisions)
    signed = [record for record in decisions if record["payload"]]
    assert [record["event"] for record in signed] == [
        "started",
        "promoted",
        "promoted",
        "finished",
        "started",
        "aborted",
    ]
    kid = story.operator.public.kid
    assert {record["decided_by"] for record in signed} == {f"an operator (key {kid[:10]}…)"}
    rollback = next(record for record in decisions if "rollback" in record["summary"])
    assert rollback["decided_by"] == f"an operator, by command (key {kid[:10]}…)"
    assert rollback["message"]["device"] == "pi-03"


def test_no_reading_result_or_label_leaves_the_database(folder: Path) -> None:
    kinds = {json.loads(line["payload"])["kind"] for line in read_lines(folder / "messages" / "part-0001.jsonl")}
    assert kinds == {"alerts", "audit", "health", "quality", "shadow"}
    assert [path for path, data in read_files(folder).items() if b"lifted a box" in data] == []
    label = next(record for record in read_lines(folder / "decisions.jsonl") if "label" in record["summary"])
    assert label["message"] is None
    assert "This folder holds no sensor reading, no result and no label" in text_of(folder)
    assert "1 signed message in which an operator sent labels" in text_of(folder)


def test_the_page_is_complete_and_loads_nothing(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    assert "<script" not in page
    assert re.findall(r'(?:src|href)="(?!#)([^"]+)"', page)
    for target in re.findall(r'(?:src|href)="(?!#)([^"]+)"', page):
        assert (folder / target).is_file(), target
    for target in re.findall(r'href="#([^"]+)"', page):
        assert f'<section id="{target}">' in page
    text = text_of(folder)
    assert "1 critical incident open: pi-02." in text
    assert "wy: repeats one value." in text
    assert "2 d 18 h so far" in text
    assert "exercise-1-2 aborted" in text
    assert "Latest reports: 4 devices run it." in text
    assert "0.810 of 400" in text
    assert "Model quality before deployment: no evaluation was given" in text
    assert "4 device keys valid, 1 revoked or replaced." in text
    assert re.search(r"root 1 2 of 2 keys that root 1 lists; 2 required [0-9a-f]{12}…, [0-9a-f]{12}…", text)


def test_text_from_devices_becomes_neither_markup_nor_formula(small: Story, tmp_path: Path) -> None:
    sender = MessageSender("pi-09", small.operator, "5f0c2f6e-1a54-4d0b-9a53-000000000009")
    small.store.enrol("pi-09", sender.key.public, replace=False, now=at(0))
    evil = '=HYPERLINK("http://x")<script>alert(1)</script><img src=x onerror=alert(1)>'
    small.collect(sender, alert(sender, "<b>", "raised", 2, evil, subject="</td><script>", alert="security"), hours=2)
    small.make(tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    [row] = csv.DictReader(io.StringIO((tmp_path / "out" / "incidents.csv").read_text()))
    assert row["summary"] == "'" + evil


def test_an_alert_open_at_the_end_of_a_replaced_log_has_no_end() -> None:
    incidents = IncidentCollector(0, {"pi-07": "5f0c2f6e-1a54-4d0b-9a53-000000000002"})
    for number in (1, 2):
        sender = MessageSender(log=f"5f0c2f6e-1a54-4d0b-9a53-{number:012d}")
        body: Any = sender.verify(alert(sender, "a", "raised", number, "x")).body
        incidents.add(body)
    assert sorted(incident.state for incident in incidents.sort_by_severity()) == ["open", "unknown"]


def test_a_clock_set_back_leaves_the_duration_unknown() -> None:
    sender = MessageSender(log="5f0c2f6e-1a54-4d0b-9a53-000000000001")
    incidents = IncidentCollector(0, {})
    for state, hours in (("raised", 5), ("cleared", 3)):
        body: Any = sender.verify(alert(sender, "a", state, hours, "x")).body
        incidents.add(body)
    [incident] = incidents.sort_by_severity()
    assert (incident.state, incident.seconds) == ("closed", None)


def test_omitted_entries_are_counted_and_the_rest_verifies(
    small: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = MessageSender("pi-09", small.operator, "5f0c2f6e-1a54-4d0b-9a53-000000000009")
    small.store.enrol("pi-09", sender.key.public, replace=False, now=at(0))
    for number in range(9):
        severity = "critical" if number == 4 else "info"
        small.collect(sender, alert(sender, f"a{number}", "raised", 2, "full", severity=severity), hours=2)
    limits = WriteLimits(incidents=3, decisions=1, messages=4, open_alerts=5)
    for name in ("incidents", "decisions", "gather"):
        monkeypatch.setattr(f"outstation.evidence.gather.{name}.WRITE_LIMITS", limits)
    evidence = small.make(tmp_path / "out")
    assert evidence.facts.omitted["incidents"] == 6
    incidents = json.loads((tmp_path / "out" / "incidents.json").read_text())
    assert [incident["severity"] for incident in incidents] == ["critical", "info", "info"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["omitted"]["incidents"] == 6
    assert "6 incidents above the limit of this folder." in text_of(tmp_path / "out")
    assert "9 incidents (" in text_of(tmp_path / "out")
    assert "6 further incidents, none worse than these, are only counted." in text_of(tmp_path / "out")
    report = verify(tmp_path / "out", [small.operator.public])
    assert report.ok, report.problems
    assert report.unsupported > 0


def test_an_altered_stored_message_is_ignored_and_reported(small: Story, tmp_path: Path) -> None:
    sender = small.device("pi-09", 9)
    small.collect(sender, alert(sender, "a", "raised", 2, "the pump stands still"), hours=2)
    with small.store.transaction() as db:
        changed = "CAST(replace(payload, 'stands', 'standz') AS BLOB)"
        assert db.execute(f"UPDATE messages SET payload = {changed} WHERE kind = 'alerts'").rowcount == 1
    result = run("--out", tmp_path / "out", "--dir", small.home, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert (document["passed"], document["unverified"], document["incidents"]) == (False, 1, 0)
    assert "standz" not in text_of(tmp_path / "out")
    assert "Problems 1 stored message cannot be verified." in text_of(tmp_path / "out")
    # The folder holds only valid messages, but the audit of its database failed.
    [problem] = verify(tmp_path / "out", [small.operator.public]).problems
    assert problem["file"] == "audit.json"
    assert "1 messages or rows of tables that are not as signed" in problem["problem"]


def test_a_decision_not_signed_by_the_operator_is_counted_only(story: Story, tmp_path: Path) -> None:
    sql = "UPDATE decisions SET payload = CAST(replace(payload, 'Aborted', 'Loved!!') AS BLOB) WHERE event = 'aborted'"
    with story.store.transaction() as db:
        original = db.execute("SELECT payload FROM decisions WHERE event = 'aborted'").fetchone()[0]
        db.execute(sql)
    try:
        evidence = story.make(tmp_path / "out")
    finally:
        with story.store.transaction() as db:
            db.execute("UPDATE decisions SET payload = ? WHERE event = 'aborted'", (original,))
    assert (evidence.facts.unverified, evidence.facts.audit["passed"]) == (1, False)
    assert "aborted" not in [record["event"] for record in read_lines(tmp_path / "out" / "decisions.jsonl")]


def test_a_device_without_a_report_is_named(small: Story, tmp_path: Path) -> None:
    small.device("pi-33", 33)
    small.make(tmp_path / "out")
    assert "pi-33 has not reported any models, so theirs are unknown." in text_of(tmp_path / "out")


def test_an_empty_fleet_needs_a_time(tmp_path: Path) -> None:
    empty = Story.begin(tmp_path / "acme")
    with pytest.raises(UsageError, match="no message is stored yet"):
        empty.make(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    empty.make(tmp_path / "out", LATER)
    empty.store.close()
    assert "Nothing was collected yet" in text_of(tmp_path / "out")
    assert verify(tmp_path / "out", [empty.operator.public]).ok
    points = json.loads((tmp_path / "out" / "mapping.json").read_text())["points"]
    monitoring = next(point for point in points if point["id"] == "MEASURE 2.4")
    assert monitoring["files_present"] == []


def test_a_time_before_the_newest_message_is_refused(small: Story, tmp_path: Path) -> None:
    sender = small.device("pi-09", 9)
    small.collect(sender, alert(sender, "a", "raised", 2, "x"), hours=2)
    with pytest.raises(UsageError, match="earlier than the newest message"):
        small.make(tmp_path / "out", at(1.5))
    small.make(tmp_path / "out", at(12))
    [incident] = json.loads((tmp_path / "out" / "incidents.json").read_text())
    assert incident["seconds"] == 10 * 3600


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_an_existing_path_is_never_overwritten(small: Story, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        out.symlink_to(tmp_path / "acme")
    with pytest.raises(UsageError, match="exists already"):
        small.make(out)


def test_a_failed_or_killed_run_leaves_no_partial_folder(
    small: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(make, "render_html", interrupt)
        with pytest.raises(KeyboardInterrupt):
            small.make(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acme"]
    killed = tmp_path / ".out.new"
    killed.mkdir()
    (killed / "half").write_text("x")
    small.make(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acme", "out"]
    assert not (tmp_path / "out" / "half").exists()


def test_an_unreadable_bundle_is_named(small: Story, tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"PK no")
    with pytest.raises(BadBundle, match=r"no\.zip"):
        small.make(tmp_path / "out", bundles=[tmp_path / "no.zip"])
    assert not (tmp_path / "out").exists()
    targets = small.home / "repository" / "targets" / "x"
    targets.mkdir(parents=True)
    (tmp_path / "no.zip").rename(targets / "broken.zip")
    small.make(tmp_path / "out")
    assert "Unreadable bundles: broken.zip" in text_of(tmp_path / "out")


def evaluation(digest: str) -> Evaluation:
    return Evaluation(
        evaluated_at="2026-11-20T10:00:00Z", agent="0.1.0", seconds=1.0,
        model=EvaluatedModel(
            name="exercise", version="1.0.0", digest=digest, kind="classify", runtime="litert", signature="ok",
            fields=["ax"], units=["g"], labels=["PEN"], window=(100, 50), threshold=None, temperature=1.0, bytes=1,
            sha256="ab",
        ),
        data=EvaluationData(
            files=[SourceFile(file="held-out.csv", rows=10)], rows=10, rejected=0, windows=10, unlabelled=0, mixed=0,
            label="label", counts={"PEN": 10},
        ),
        intervals="bootstrap", metric="accuracy", direction="higher",
        metrics=[MetricEstimate("accuracy", 0.9123, 0.88, 0.94, 1000)], warnings=["One subject is in both parts."],
    )  # fmt: skip


def test_an_evaluation_needs_its_bundle(small: Story, tmp_path: Path) -> None:
    file = tmp_path / "exercise.json"
    file.write_bytes(msgspec.json.encode(evaluation(small.digest)))
    result = run("--out", tmp_path / "out", "--dir", small.home, "--evaluation", file)
    assert result.exit_code == 0, (result.output, result.exception)
    text = text_of(tmp_path / "out")
    assert "accuracy 0.912 [0.880, 0.940]" in text
    assert "One subject is in both parts." in text
    assert next((tmp_path / "out" / "bundles").rglob("evaluation.json")).read_bytes() == file.read_bytes()
    file.write_bytes(msgspec.json.encode(evaluation("sha256:" + "0" * 64)))
    result = run("--out", tmp_path / "other", "--dir", small.home, "--evaluation", file)
    assert isinstance(result.exception, UsageError)
    assert "--bundle PATH" in str(result.exception)


def test_a_bundle_signed_by_the_operator_verifies(small: Story, tmp_path: Path) -> None:
    shutil.copytree(EXERCISE, tmp_path / "own")
    resign(tmp_path / "own", small.operator)
    small.make(tmp_path / "out", publishers=[], bundles=[tmp_path / "own"])
    [card] = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("about.json")]
    assert (card["signature_verified"], card["signer"]) == (True, small.operator.public.kid)
    assert verify(tmp_path / "out", [small.operator.public]).ok


def test_a_bundle_of_an_unknown_publisher_is_not_verified(small: Story, tmp_path: Path) -> None:
    small.make(tmp_path / "out", publishers=[], bundles=[EXERCISE])
    [card] = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("about.json")]
    assert card["signature_verified"] is False
    assert "Signature not verified: the publisher's key" in text_of(tmp_path / "out")
    assert verify(tmp_path / "out", [small.operator.public]).ok


def test_the_sbom_is_valid_cyclonedx_with_libraries_and_models(folder: Path) -> None:
    # Its import takes a second, and each process that runs tests imports this file.
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (folder / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    assert bill["metadata"]["component"]["name"] == "outstation"
    components = {component["name"]: component for component in bill["components"]}
    assert {"numpy", "cryptography", "paho-mqtt", "msgspec", "exercise"} <= set(components)
    assert "pytest" not in components
    assert components["exercise"]["type"] == "machine-learning-model"
    assert components["exercise"]["hashes"][0]["alg"] == "SHA-256"
    agent = next(entry for entry in bill["dependencies"] if entry["ref"] == bill["metadata"]["component"]["bom-ref"])
    assert any(ref.startswith("pkg:pypi/numpy@") for ref in agent["dependsOn"])
    assert sbom.normalize_name("Paho_MQTT") == "paho-mqtt"


def test_framework_points_name_files_of_the_folder(folder: Path) -> None:
    ids = [point.id for point in frameworks.POINTS]
    assert len(ids) == len(set(ids))
    documents = {"MODEL_CARD.md", "DATA_CARD.md", "evaluation.json"}
    named = {name for point in frameworks.POINTS for name in point.files} - documents
    assert [name for name in named if not (folder / name.rstrip("/")).exists()] == []
    assert {point.part for point in frameworks.POINTS} == {"Govern", "Map", "Measure", "Manage", "Annex A"}
    points = json.loads((folder / "mapping.json").read_text())["points"]
    assert next(point for point in points if point["id"] == "MEASURE 2.1")["files_missing"] == ["evaluation.json"]


def test_the_page_of_a_large_fleet_stays_readable(tmp_path: Path) -> None:
    story = Story.begin(tmp_path / "acme")
    for number in range(150):
        sender = story.device(f"pi-{number:03}", number + 1)
        sent = [activated(story, sender, number / 100), health(story, sender, 4)]
        story.collect(sender, *sent, alert(sender, "a", "raised", 4, "x"), hours=4)
    story.make(tmp_path / "out")
    story.store.close()
    assert len((tmp_path / "out" / "index.html").read_bytes()) < 200_000
    text = text_of(tmp_path / "out")
    assert "150 incidents (" in text
    assert "125 more in incidents.json" in text
    assert "Models in use 1 in 1 task Incidents" in text
    assert "110 running.json" not in text
    report = verify(tmp_path / "out", [story.operator.public])
    assert (report.problems, report.messages) == ([], 450)


def test_command_output_says_what_to_do(story: Story, tmp_path: Path) -> None:
    result = run("--out", tmp_path / "out", "--dir", story.home)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "Check it anywhere: outstation fleet evidence verify" in result.stdout
    key = story.home / "operator.key.pub"
    result = run("verify", tmp_path / "out", "--operator", key)
    assert result.stdout.splitlines()[-1] == "VERIFIED"
    (tmp_path / "out" / "running.json").unlink()
    result = run("verify", tmp_path / "out", "--operator", key)
    assert result.exit_code == 1
    assert "running.json: is listed in the manifest but missing" in result.stdout
    assert result.stdout.splitlines()[-1] == "WRONG: do not rely on this folder"
    for args, words in (
        ((), "--out DIR is missing"),
        (("verify", tmp_path / "out"), "--operator PUB is missing"),
        (("verify", tmp_path / "nothing", "--operator", key), "no such folder"),
        (("--out", tmp_path / "x", "--at", "yesterday", "--dir", story.home), "write a time with its time zone"),
    ):
        wrong = run(*args)
        assert isinstance(wrong.exception, UsageError)
        assert words in str(wrong.exception)
    for help_of in (("--help",), ("verify", "--help")):
        assert "Example: outstation fleet evidence" in run(*help_of).stdout


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "–"), (0.2, "under 1 s"), (59, "59 s"), (3600, "1 h"), (11_520, "3 h 12 min"), (90_061, "1 d 1 h")],
)
def test_durations_have_two_units_at_most(seconds: float | None, words: str) -> None:
    assert format_duration(seconds) == words


def test_a_full_disk_leaves_nothing_and_gives_one_line(story: Story, tmp_path: Path) -> None:
    """A limit on file size, which the page exceeds, stands in for a full disk."""
    command = [sys.executable, "-m", "outstation", "fleet", "evidence", "--dir", str(story.home), "--out", "out"]
    limit = "import resource, os; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
    limited = f"{limit}os.execv({command[0]!r}, {command!r})"
    done = subprocess.run([sys.executable, "-c", limited], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(
        r"outstation: out: messages/part-0001\.jsonl cannot be written: .*; no folder was created\n", done.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_event_names_and_tasks_of_a_device_are_bounded(
    small: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = WriteLimits(event_names=3, tasks=2, models=1)
    for name in ("decisions", "deployments", "accuracy"):
        monkeypatch.setattr(f"outstation.evidence.gather.{name}.WRITE_LIMITS", limits)
    sender = small.device("pi-09", 9)
    for number in range(8):
        event = sender.append("audit", event=f"invented {number}", summary="x", evidence={}, time=at(2))
        to = {"name": f"m{number}", "version": "1", "digest": f"sha256:{number}"}
        evidence = {"task": f"t{number}", "to": to, "why": "configured"}
        activation = sender.append("audit", event="activated", summary="x", evidence=evidence, time=at(2))
        small.collect(sender, event, activation, hours=2)
    facts = small.make(tmp_path / "out").facts
    assert len(facts.event_counts) == 4
    assert facts.event_counts["others"] > 0
    assert sum(facts.event_counts.values()) == 18
    assert len(facts.bundle_history) == 1
    assert facts.omitted["bundle activations"] > 0


def test_collector_alerts_are_marked_as_not_signed(small: Story, tmp_path: Path) -> None:
    small.store.revoke("pi-02", None, at(3))
    small.make(tmp_path / "out")
    [incident] = json.loads((tmp_path / "out" / "incidents.json").read_text())
    names = ("source", "state", "raised", "device")
    assert [incident[name] for name in names] == ["collector", "open", None, "pi-02"]
    assert "(detected by the collector; not signed)" in text_of(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [key["owner"] for key in manifest["keys"] if key.get("revoked")] == ["pi-02"]
    # Messages signed before the revocation still verify.
    assert verify(tmp_path / "out", [small.operator.public]).ok


def test_metrics_of_labels_at_the_collector_are_included(small: Story, tmp_path: Path) -> None:
    with small.store.transaction() as db:
        row = ("pi-01", "exercise", at(2), "accuracy", "", 0.75, 0.6, 0.86, 40, None, "collector", "x", 0)
        db.execute("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '')", row)
        db.execute("INSERT INTO labels VALUES ('pi-01', 'exercise', 'x', 1, 'PEN', 'human', ?, 'eva', '')", (at(2),))
    small.make(tmp_path / "out")
    [entry] = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert (entry["source"], entry["labels"], entry["metrics"][0]["value"]) == ("collector", {"human": 1}, 0.75)
    assert verify(tmp_path / "out", [small.operator.public]).ok


def test_decisions_of_a_former_operator_key_count_while_listed(story: Story, tmp_path: Path) -> None:
    successor = new_key(123)
    story.make(tmp_path / "out", operator=successor, operators=[successor.public, story.operator.public])
    report = verify(tmp_path / "out", [successor.public])
    assert (report.problems, report.signer) == ([], successor.public.kid)
    assert "earlier decisions; a newer key replaced it" in text_of(tmp_path / "out")
    facts = story.make(tmp_path / "other", operator=successor, operators=[successor.public]).facts
    assert (facts.unverified, facts.audit["passed"]) == (6, False)


def test_missing_messages_are_reported(small: Story, tmp_path: Path) -> None:
    sender = small.device("pi-09", 9)
    sent = [alert(sender, f"a{i}", "raised", 2, "x") for i in range(3)]
    small.collect(sender, sent[0], sent[2], hours=2)
    evidence = small.make(tmp_path / "out")
    assert evidence.facts.audit["undeclared_gaps"] == 1
    assert "Messages are missing without an explanation (1 range)." in text_of(tmp_path / "out")
    assert "The content of the missing messages." in text_of(tmp_path / "out")


def test_equal_decisions_of_devices_share_a_timeline_entry(small: Story, tmp_path: Path) -> None:
    small.make(tmp_path / "out")
    entry = "10 Nov 2026, 06:00 · pi-02, pi-01 · activated exercise: exercise 1.0.0 was activated."
    assert entry in text_of(tmp_path / "out")
