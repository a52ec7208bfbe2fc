"""The evidence folder: what it tells, what it leaves out, and that it is made whole or not at all."""

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
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from agent.cli.fleet.group import fleet
from agent.errors import BadBundle, UsageError
from agent.evaluation.document import EvaluatedModel, Evaluation, EvaluationData, SourceFile
from agent.fleet.evidence import make as making
from agent.fleet.evidence.format import frameworks
from agent.fleet.evidence.format.contents import WriteLimits
from agent.fleet.evidence.gather import sbom
from agent.fleet.evidence.gather.incidents import IncidentCollector
from agent.fleet.evidence.page.elements import format_duration
from agent.fleet.evidence.verify.verify import verify
from agent.performance.estimates import MetricEstimate
from agent.testing.messages import MessageSender, new_key
from scripts.kit.bundles import resign
from tests.kit.evidences import EXERCISE, Story, activated, alert, at, health, told

LATER = at(200)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    made = told(tmp_path_factory.mktemp("story") / "acme")
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def folder(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evidence") / "acme-2026-11"
    story.make(out)
    return out


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Story]:
    """A fleet of two devices that may be changed."""
    made = Story.begin(tmp_path / "acme")
    for number in (1, 2):
        sender = made.device(f"pi-0{number}", number)
        made.collect(sender, activated(made, sender, 0), health(made, sender, 1), hours=1)
    yield made
    made.store.close()


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(fleet, ["evidence", *[str(arg) for arg in args]])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def text_of(folder: Path) -> str:
    """The page as a reader sees it."""
    return html.unescape(
        " ".join(re.sub(r"<[^>]+>", " ", (folder / "index.html").read_text().split("</style>")[1]).split())
    )


def test_a_copy_verifies_in_a_fresh_process_that_has_the_folder_and_the_key_and_nothing_else(
    story: Story, folder: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    subprocess.run(["cp", "-r", str(folder), str(alone / "received")], check=True)
    command = [sys.executable, "-P", "-m", "agent", "fleet", "evidence", "verify", "received", "--json"]
    done = subprocess.run(
        [*command, "--key", story.operator.public.text], cwd=alone, env={}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["ok"], report["problems"], report["fleet"], report["signer"]) == (
        True, [], "acme", story.operator.public.kid,
    )  # fmt: skip
    assert report["files"] == len(everything(folder)) - 2
    assert (report["decisions"], report["bundles"], report["unsupported"]) == (27, 2, 0)
    assert report["messages"] == len(lines(folder / "messages" / "part-0001.jsonl")) > 20


def test_the_same_database_and_time_give_the_same_bytes(story: Story, folder: Path, tmp_path: Path) -> None:
    story.make(tmp_path / "again")
    assert everything(tmp_path / "again") == everything(folder)


def test_incidents_say_how_long_they_lasted_and_which_messages_say_so(folder: Path) -> None:
    found = {one["subject"] + one["alert"]: one for one in json.loads((folder / "incidents.json").read_text())}
    drift, fault, storage = found["axdrift"], found["wyfault"], found["diskstorage"]
    assert (drift["state"], drift["seconds"], drift["device"]) == ("over", 24.5 * 3600, "pi-01")
    assert drift["raised"]["seq"] < drift["cleared"]["seq"]
    # Open: up to the newest message.
    assert (fault["state"], fault["seconds"], fault["ended"]) == ("open", 66 * 3600, None)
    assert (storage["state"], storage["clock"]) == ("over", "unsynced")
    rows = list(csv.DictReader(io.StringIO((folder / "incidents.csv").read_text())))
    assert [row["severity"] for row in rows] == ["critical", "warning", "info"]


def test_what_runs_where_says_since_when_and_by_whom(folder: Path) -> None:
    found = json.loads((folder / "running.json").read_text())
    assert [one["device"] for one in found] == ["pi-01", "pi-02", "pi-03", "pi-04"]
    assert [one["model"]["version"] for one in found] == ["1.1.0", "1.1.0", "1.0.0", "1.1.0"]
    assert [one["who"] for one in found[1:3]] == ["an operator, by a roll-out", "an operator, by command"]
    assert [one["since"] for one in found[1:3]] == [at(81.1), at(96)]
    ran = {one["model"]["version"]: one for one in json.loads((folder / "history.json").read_text())}
    assert [(ran[v]["activations"], ran[v]["devices"], ran[v]["running"]) for v in ("1.0.0", "1.1.0")] == [
        (5, 4, 1), (4, 4, 3),
    ]  # fmt: skip
    assert {one["agent"] for one in found} == {"0.1.0"}


def test_decisions_name_who_took_them_and_those_of_operators_carry_their_signature(story: Story, folder: Path) -> None:
    found = lines(folder / "decisions.jsonl")
    assert [one["time"] for one in found] == sorted(one["time"] for one in found)
    signed = [one for one in found if one["payload"]]
    assert [one["event"] for one in signed] == ["started", "promoted", "promoted", "finished", "started", "aborted"]
    kid = story.operator.public.kid
    assert {one["who"] for one in signed} == {f"an operator (key {kid[:10]}…)"}
    rollback = next(one for one in found if "rollback" in one["summary"])
    assert rollback["who"] == f"operator, by command (key {kid[:10]}…)"
    assert rollback["place"]["device"] == "pi-03"


def test_no_reading_no_result_and_no_label_leaves(folder: Path) -> None:
    kinds = {json.loads(one["payload"])["kind"] for one in lines(folder / "messages" / "part-0001.jsonl")}
    assert kinds == {"alerts", "audit", "health", "quality", "shadow"}
    assert [path for path, data in everything(folder).items() if b"lifted a box" in data] == []
    label = next(one for one in lines(folder / "decisions.jsonl") if "label" in one["summary"])
    assert label["place"] is None
    assert "No reading of any sensor is in this folder" in text_of(folder)
    assert "1 signed message in which an operator sent labels" in text_of(folder)


def test_the_page_tells_the_story_and_loads_nothing(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    assert "<script" not in page
    assert re.findall(r'(?:src|href)="(?!#)([^"]+)"', page)
    for target in re.findall(r'(?:src|href)="(?!#)([^"]+)"', page):
        assert (folder / target).is_file(), target
    for target in re.findall(r'href="#([^"]+)"', page):
        assert f'<section id="{target}">' in page
    said = text_of(folder)
    assert "1 critical incident goes on: pi-02." in said
    assert "wy: repeats one value." in said
    assert "2 d 18 h so far" in said
    assert "exercise-1-2 aborted" in said
    assert "By their last word: 4 devices run it for good." in said
    assert "0.810 of 400" in said
    assert "How good models were before use: no evaluation was given" in said
    assert "4 device keys in force, 1 revoked or replaced." in said
    assert re.search(r"root 1 2 of the 2 keys that root 1 lists; 2 must [0-9a-f]{12}…, [0-9a-f]{12}…", said)


def test_what_devices_write_cannot_become_part_of_the_page_or_a_formula(small: Story, tmp_path: Path) -> None:
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


def test_an_alert_that_was_open_when_a_devices_log_ended_has_an_unknown_end() -> None:
    found = IncidentCollector(0, {"pi-07": "5f0c2f6e-1a54-4d0b-9a53-000000000002"})
    for number in (1, 2):
        sender = MessageSender(log=f"5f0c2f6e-1a54-4d0b-9a53-{number:012d}")
        body: Any = sender.verify(alert(sender, "a", "raised", number, "x")).body
        found.add(body)
    assert sorted(one.state for one in found.sort_by_severity()) == ["open", "unknown"]


def test_a_clock_that_was_set_back_gives_no_length_at_all() -> None:
    sender = MessageSender(log="5f0c2f6e-1a54-4d0b-9a53-000000000001")
    found = IncidentCollector(0, {})
    for state, hours in (("raised", 5), ("cleared", 3)):
        body: Any = sender.verify(alert(sender, "a", state, hours, "x")).body
        found.add(body)
    [one] = found.sort_by_severity()
    assert (one.state, one.seconds) == ("over", None)


def test_what_is_too_much_is_counted_and_said_and_the_rest_verifies(
    small: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = MessageSender("pi-09", small.operator, "5f0c2f6e-1a54-4d0b-9a53-000000000009")
    small.store.enrol("pi-09", sender.key.public, replace=False, now=at(0))
    for number in range(9):
        severity = "critical" if number == 4 else "info"
        small.collect(sender, alert(sender, f"a{number}", "raised", 2, "full", severity=severity), hours=2)
    few = WriteLimits(incidents=3, decisions=1, messages=4, open_alerts=5)
    for name in ("incidents", "decisions", "gather"):
        monkeypatch.setattr(f"agent.fleet.evidence.gather.{name}.WRITE_LIMITS", few)
    made = small.make(tmp_path / "out")
    assert made.facts.omitted["incidents"] == 6
    kept = json.loads((tmp_path / "out" / "incidents.json").read_text())
    assert [one["severity"] for one in kept] == ["critical", "info", "info"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["left_out"]["incidents"] == 6
    assert "6 incidents were too many for this folder." in text_of(tmp_path / "out")
    assert "9 incidents in all" in text_of(tmp_path / "out")
    assert "6 others, none of them worse than these, are counted only." in text_of(tmp_path / "out")
    report = verify(tmp_path / "out", [small.operator.public])
    assert report.ok, report.problems
    assert report.unsupported > 0


def test_a_stored_message_that_does_not_verify_is_not_told_and_the_page_says_that_something_is_wrong(
    small: Story, tmp_path: Path
) -> None:
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
    assert "This is wrong 1 stored message cannot be verified." in text_of(tmp_path / "out")
    # What is in the folder is what can be verified.
    assert verify(tmp_path / "out", [small.operator.public]).ok


def test_a_decision_that_the_operator_did_not_sign_is_left_out_and_counted(story: Story, tmp_path: Path) -> None:
    sql = "UPDATE decisions SET payload = CAST(replace(payload, 'Aborted', 'Loved!!') AS BLOB) WHERE event = 'aborted'"
    with story.store.transaction() as db:
        before = db.execute("SELECT payload FROM decisions WHERE event = 'aborted'").fetchone()[0]
        db.execute(sql)
    try:
        made = story.make(tmp_path / "out")
    finally:
        with story.store.transaction() as db:
            db.execute("UPDATE decisions SET payload = ? WHERE event = 'aborted'", (before,))
    assert (made.facts.unverified, made.facts.audit["passed"]) == (1, False)
    assert "aborted" not in [one["event"] for one in lines(tmp_path / "out" / "decisions.jsonl")]


def test_a_device_that_never_told_what_it_runs_is_named_as_not_known(small: Story, tmp_path: Path) -> None:
    small.device("pi-33", 33)
    small.make(tmp_path / "out")
    assert "pi-33 has not told what runs: what runs there is not known." in text_of(tmp_path / "out")


def test_an_empty_fleet_needs_a_time_and_then_says_that_nothing_was_collected(tmp_path: Path) -> None:
    empty = Story.begin(tmp_path / "acme")
    with pytest.raises(UsageError, match="nothing was collected yet"):
        empty.make(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    empty.make(tmp_path / "out", LATER)
    empty.store.close()
    assert "Nothing was collected yet" in text_of(tmp_path / "out")
    assert verify(tmp_path / "out", [empty.operator.public]).ok
    points = json.loads((tmp_path / "out" / "mapping.json").read_text())["points"]
    monitored = next(one for one in points if one["id"] == "MEASURE 2.4")
    assert monitored["here"] == []


def test_a_moment_before_the_newest_message_is_refused_and_a_later_one_counts_on(small: Story, tmp_path: Path) -> None:
    sender = small.device("pi-09", 9)
    small.collect(sender, alert(sender, "a", "raised", 2, "x"), hours=2)
    with pytest.raises(UsageError, match="the newest message came at"):
        small.make(tmp_path / "out", at(1.5))
    small.make(tmp_path / "out", at(12))
    [one] = json.loads((tmp_path / "out" / "incidents.json").read_text())
    assert one["seconds"] == 10 * 3600


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_what_is_there_already_is_never_written_over(small: Story, tmp_path: Path, there: str) -> None:
    out = tmp_path / "out"
    if there == "file":
        out.write_text("mine")
    elif there == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        out.symlink_to(tmp_path / "acme")
    with pytest.raises(UsageError, match="is there already"):
        small.make(out)


def test_a_making_that_fails_or_was_killed_leaves_no_half_folder(
    small: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(making, "render_html", dies)
        with pytest.raises(KeyboardInterrupt):
            small.make(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acme"]
    killed = tmp_path / ".out.new"
    killed.mkdir()
    (killed / "half").write_text("x")
    small.make(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acme", "out"]
    assert not (tmp_path / "out" / "half").exists()


def test_a_bundle_that_cannot_be_read_is_named_and_one_in_the_repository_too(small: Story, tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"PK no")
    with pytest.raises(BadBundle, match=r"no\.zip"):
        small.make(tmp_path / "out", bundles=[tmp_path / "no.zip"])
    assert not (tmp_path / "out").exists()
    targets = small.home / "repository" / "targets" / "x"
    targets.mkdir(parents=True)
    (tmp_path / "no.zip").rename(targets / "broken.zip")
    small.make(tmp_path / "out")
    assert "Could not be read: broken.zip" in text_of(tmp_path / "out")


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


def test_an_evaluation_stands_with_its_bundle_and_one_of_an_unknown_bundle_is_refused(
    small: Story, tmp_path: Path
) -> None:
    file = tmp_path / "exercise.json"
    file.write_bytes(msgspec.json.encode(evaluation(small.digest)))
    result = run("--out", tmp_path / "out", "--dir", small.home, "--evaluation", file)
    assert result.exit_code == 0, (result.output, result.exception)
    said = text_of(tmp_path / "out")
    assert "accuracy 0.912 [0.880, 0.940]" in said
    assert "One subject is in both parts." in said
    assert next((tmp_path / "out" / "bundles").rglob("evaluation.json")).read_bytes() == file.read_bytes()
    file.write_bytes(msgspec.json.encode(evaluation("sha256:" + "0" * 64)))
    result = run("--out", tmp_path / "other", "--dir", small.home, "--evaluation", file)
    assert isinstance(result.exception, UsageError)
    assert "--bundle PATH" in str(result.exception)


def test_a_bundle_that_the_operator_signed_is_checked_with_the_operators_key(small: Story, tmp_path: Path) -> None:
    shutil.copytree(EXERCISE, tmp_path / "own")
    resign(tmp_path / "own", small.operator)
    small.make(tmp_path / "out", publishers=[], bundles=[tmp_path / "own"])
    [card] = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("about.json")]
    assert (card["checked"], card["signer"]) == (True, small.operator.public.kid)
    assert verify(tmp_path / "out", [small.operator.public]).ok


def test_a_bundle_whose_publisher_is_not_known_is_not_said_to_be_checked(small: Story, tmp_path: Path) -> None:
    small.make(tmp_path / "out", publishers=[], bundles=[EXERCISE])
    [card] = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("about.json")]
    assert card["checked"] is False
    assert "was not checked: that publisher's key was not given" in text_of(tmp_path / "out")
    assert verify(tmp_path / "out", [small.operator.public]).ok


def test_the_bill_of_materials_is_valid_cyclonedx_and_lists_agent_libraries_and_models(folder: Path) -> None:
    text = (folder / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    assert bill["metadata"]["component"]["name"] == "outstation"
    names = {one["name"]: one for one in bill["components"]}
    assert {"numpy", "cryptography", "paho-mqtt", "msgspec", "exercise"} <= set(names)
    assert "pytest" not in names
    assert names["exercise"]["type"] == "machine-learning-model"
    assert names["exercise"]["hashes"][0]["alg"] == "SHA-256"
    agent = next(one for one in bill["dependencies"] if one["ref"] == bill["metadata"]["component"]["bom-ref"])
    assert any(ref.startswith("pkg:pypi/numpy@") for ref in agent["dependsOn"])
    assert sbom.normalize_name("Paho_MQTT") == "paho-mqtt"


def test_each_point_of_the_frameworks_names_files_that_a_folder_can_have(folder: Path) -> None:
    ids = [point.id for point in frameworks.POINTS]
    assert len(ids) == len(set(ids))
    papers = {"MODEL_CARD.md", "DATA_CARD.md", "evaluation.json"}
    named = {name for point in frameworks.POINTS for name in point.files} - papers
    assert [name for name in named if not (folder / name.rstrip("/")).exists()] == []
    assert {point.part for point in frameworks.POINTS} == {"Govern", "Map", "Measure", "Manage", "Annex A"}
    found = json.loads((folder / "mapping.json").read_text())["points"]
    assert next(one for one in found if one["id"] == "MEASURE 2.1")["not_here"] == ["evaluation.json"]


def test_hundreds_of_devices_give_a_page_that_can_be_read(tmp_path: Path) -> None:
    many = Story.begin(tmp_path / "acme")
    for number in range(150):
        sender = many.device(f"pi-{number:03}", number + 1)
        sent = [activated(many, sender, number / 100), health(many, sender, 4)]
        many.collect(sender, *sent, alert(sender, "a", "raised", 4, "x"), hours=4)
    many.make(tmp_path / "out")
    many.store.close()
    assert len((tmp_path / "out" / "index.html").read_bytes()) < 200_000
    said = text_of(tmp_path / "out")
    assert "150 incidents in all" in said
    assert "125 more in incidents.json" in said
    assert "110 running.json" not in said
    report = verify(tmp_path / "out", [many.operator.public])
    assert (report.problems, report.messages) == ([], 450)


def test_the_commands_answer_in_words_and_say_what_to_do(story: Story, tmp_path: Path) -> None:
    result = run("--out", tmp_path / "out", "--dir", story.home)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "Check it anywhere: outstation fleet evidence verify" in result.stdout
    key = story.home / "operator.key.pub"
    result = run("verify", tmp_path / "out", "--key", key)
    assert result.stdout.splitlines()[-1] == "VERIFIED"
    (tmp_path / "out" / "running.json").unlink()
    result = run("verify", tmp_path / "out", "--key", key)
    assert result.exit_code == 1
    assert "running.json: is listed in the manifest, and missing" in result.stdout
    assert result.stdout.splitlines()[-1] == "WRONG: do not rely on this folder"
    for args, words in (
        ((), "--out DIR is missing"),
        (("verify", tmp_path / "out"), "--key PUB is missing"),
        (("verify", tmp_path / "nothing", "--key", key), "no such folder"),
        (("--out", tmp_path / "x", "--at", "yesterday", "--dir", story.home), "write a moment with its time zone"),
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
def test_spans_read_as_people_say_them(seconds: float | None, words: str) -> None:
    assert format_duration(seconds) == words


def test_a_full_disk_leaves_nothing_and_is_told_in_one_line(story: Story, tmp_path: Path) -> None:
    """No file may be longer than the page is, which stands for a disk that is full by then."""
    command = [sys.executable, "-m", "agent", "fleet", "evidence", "--dir", str(story.home), "--out", "out"]
    limit = "import resource, os; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
    limited = f"{limit}os.execv({command[0]!r}, {command!r})"
    done = subprocess.run([sys.executable, "-c", limited], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(
        r"outstation: out: messages/part-0001\.jsonl cannot be written: .*; nothing was left there\n", done.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_makes_up_events_and_tasks_without_end_is_held_in_bounds(
    small: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = WriteLimits(event_names=3, tasks=2, models=1)
    for name in ("decisions", "deployments", "accuracy"):
        monkeypatch.setattr(f"agent.fleet.evidence.gather.{name}.WRITE_LIMITS", few)
    sender = small.device("pi-09", 9)
    for number in range(8):
        sent = sender.append("audit", event=f"made up {number}", summary="x", evidence={}, time=at(2))
        to = {"name": f"m{number}", "version": "1", "digest": f"sha256:{number}"}
        evidence = {"task": f"t{number}", "to": to, "why": "configured"}
        told = sender.append("audit", event="activated", summary="x", evidence=evidence, time=at(2))
        small.collect(sender, sent, told, hours=2)
    made = small.make(tmp_path / "out")
    assert len(made.facts.event_counts) == 4
    assert made.facts.event_counts["others"] > 0
    assert sum(made.facts.event_counts.values()) == 18
    assert len(made.facts.bundle_history) == 1
    assert made.facts.omitted["activations of bundles"] > 0


def test_what_the_collector_noticed_itself_is_told_and_marked_as_not_signed(small: Story, tmp_path: Path) -> None:
    small.store.revoke("pi-02", None, at(3))
    small.make(tmp_path / "out")
    [one] = json.loads((tmp_path / "out" / "incidents.json").read_text())
    assert (one["source"], one["state"], one["raised"], one["device"]) == ("collector", "open", None, "pi-02")
    assert (
        "was revoked: messages that it signs are refused, stored messages stay valid. (noticed by the collector;"
        in text_of(tmp_path / "out")
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [key["owner"] for key in manifest["keys"] if key.get("revoked")] == ["pi-02"]
    # What a key signed before it was revoked still verifies.
    assert verify(tmp_path / "out", [small.operator.public]).ok


def test_metrics_of_labels_that_came_to_the_collector_stand_beside_the_devices_own(
    small: Story, tmp_path: Path
) -> None:
    with small.store.transaction() as db:
        row = ("pi-01", "exercise", at(2), "accuracy", "", 0.75, 0.6, 0.86, 40, None, "collector", "x", 0)
        db.execute("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        db.execute("INSERT INTO labels VALUES ('pi-01', 'exercise', 'x', 1, 'PEN', 'human', ?)", (at(2),))
    small.make(tmp_path / "out")
    [one] = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert (one["source"], one["labels"], one["metrics"][0]["value"]) == ("collector", {"human": 1}, 0.75)
    assert verify(tmp_path / "out", [small.operator.public]).ok


def test_decisions_of_a_former_operator_key_count_as_long_as_the_fleet_names_it(story: Story, tmp_path: Path) -> None:
    following = new_key(123)
    story.make(tmp_path / "out", operator=following, operators=[following.public, story.operator.public])
    report = verify(tmp_path / "out", [following.public])
    assert (report.problems, report.signer) == ([], following.public.kid)
    assert "decisions of before: another key has followed it" in text_of(tmp_path / "out")
    made = story.make(tmp_path / "other", operator=following, operators=[following.public])
    assert (made.facts.unverified, made.facts.audit["passed"]) == (6, False)


def test_missing_messages_are_told_as_missing(small: Story, tmp_path: Path) -> None:
    sender = small.device("pi-09", 9)
    sent = [alert(sender, f"a{i}", "raised", 2, "x") for i in range(3)]
    small.collect(sender, sent[0], sent[2], hours=2)
    made = small.make(tmp_path / "out")
    assert made.facts.audit["undeclared_gaps"] == 1
    assert "Messages are missing without an explanation (1 range)." in text_of(tmp_path / "out")
    assert "What the missing messages said." in text_of(tmp_path / "out")


def test_what_many_devices_did_alike_is_one_entry_of_the_page(small: Story, tmp_path: Path) -> None:
    small.make(tmp_path / "out")
    said = text_of(tmp_path / "out")
    assert "10 Nov 2026, 06:00 · pi-02, pi-01 · activated exercise: exercise 1.0.0 was activated." in said
