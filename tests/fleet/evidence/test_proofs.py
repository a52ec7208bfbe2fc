"""What an evidence folder proves of comparisons and of who published a bundle: no byte of either can be changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata

from agent.fleet.evidence.verify.verify import verify
from agent.fleet.repository import key_rotation as rotating
from agent.fleet.repository import signature_chain
from tests.kit.damage import flips
from tests.kit.received_evidence import OPERATOR, only, problems, resign
from tests.kit.repositories import Depot, version

pytest_plugins = ["tests.kit.repository_fixtures", "tests.kit.evidence_fixtures"]


def rewritten(folder: Path, file: str, change: Callable[[Any], object]) -> None:
    """As an operator would who is not honest, and signs the folder again."""
    document = json.loads((folder / file).read_bytes())
    change(document)
    (folder / file).write_text(json.dumps(document), encoding="utf-8")
    resign(folder)


# --- comparisons ---


def test_figures_of_each_device_are_there_with_their_intervals_and_are_counted_again(folder: Path) -> None:
    report = verify(folder, [OPERATOR["key"].public])
    found = json.loads((folder / "comparisons.json").read_bytes())
    assert (report.ok, report.comparisons) == (True, 4)
    assert [one["device"] for one in found] == ["pi-01", "pi-02", "pi-03", "pi-04"]
    first, second = found[0], found[1]
    assert first["figures"][0] == {"name": "agreement", "value": None, "low": None, "high": None, "n": 0}
    figures = {one["name"]: one for one in second["figures"]}
    assert (second["new"]["version"], second["old"]["version"]) == ("1.1.0", "1.0.0")
    assert (second["windows"], second["same"], second["labelled"]) == (1200, 1140, 120)
    assert figures["agreement"]["low"] < figures["agreement"]["value"] == 0.95 < figures["agreement"]["high"]
    assert figures["time"]["value"] == pytest.approx(0.8)
    assert figures["accuracy by labels"]["value"] == pytest.approx(0.1)
    assert figures["expected accuracy"]["value"] == pytest.approx(0.02)


@pytest.mark.parametrize("name", ["windows", "same", "batches", "errors", "labelled"])
def test_a_figure_that_the_messages_do_not_come_to_is_named(folder: Path, name: str) -> None:
    rewritten(folder, "comparisons.json", lambda found: found[1].update({name: found[1][name] + 1}))
    only(folder, "comparisons.json[1]", f"says other {name} than its 12 messages come to, which the device signed")


def test_an_interval_that_the_messages_do_not_come_to_is_named(folder: Path) -> None:
    rewritten(folder, "comparisons.json", lambda found: found[1]["figures"][0].update(low=0.949))
    only(folder, "comparisons.json[1]", "says other figures than its 12 messages come to")


def test_a_comparison_the_other_way_round_is_named(folder: Path) -> None:
    rewritten(folder, "comparisons.json", lambda found: found[1].update(new_is_beside=False))
    assert {where for where, _ in problems(folder)} == {"comparisons.json[1]"}


def test_messages_of_two_devices_are_not_one_comparison(folder: Path) -> None:
    rewritten(folder, "comparisons.json", lambda found: found[1].update(places=found[1]["places"] + found[2]["places"]))
    only(folder, "comparisons.json[1]", "counts messages together that are of different devices")


def test_a_message_that_is_counted_twice_or_is_none_of_a_comparison_is_named(folder: Path) -> None:
    rewritten(folder, "comparisons.json", lambda found: found[1]["places"].append(found[1]["places"][0]))
    only(folder, "comparisons.json[1]", "counts a message twice")


def test_a_message_of_another_kind_is_no_comparison(folder: Path) -> None:
    health = json.loads((folder / "running.json").read_bytes())[1]["health"]
    rewritten(folder, "comparisons.json", lambda found: found[1]["places"].append(health))
    only(folder, "comparisons.json[1]", "which is of kind health")


def test_a_changed_byte_of_a_comparisons_message_is_named(folder: Path) -> None:
    [part] = (folder / "messages").iterdir()
    lines = part.read_text(encoding="utf-8").splitlines(keepends=True)
    number = next(i for i, line in enumerate(lines) if "/shadow/" in line)
    lines[number] = lines[number].replace('\\"agreeing\\":9', '\\"agreeing\\":8', 1)
    part.write_text("".join(lines), encoding="utf-8")
    resign(folder)
    found = problems(folder)
    assert any(where.endswith(f":{number + 1}") and "does not verify: bad signature" in what for where, what in found)
    assert any(where.startswith("comparisons.json") for where, _ in found)


# --- who published ---


def test_each_published_bundle_is_led_to_from_the_root_and_it_is_said_who_signed(folder: Path) -> None:
    report = verify(folder, [OPERATOR["key"].public])
    found = json.loads((folder / "published.json").read_bytes())
    assert [one["file"] for one in found["signatures"]] == [
        *("1.root.json", "timestamp.json", "3.snapshot.json", "2.targets.json", "2.exercise.json"),
    ]
    root = found["signatures"][0]
    assert (root["threshold"], len(root["keys"]), root["signed"]) == (2, 2, root["keys"])
    assert report.signatures == 6
    digests = {one["digest"] for one in found["targets"]}
    papers = [json.loads(path.read_bytes()) for path in (folder / "bundles").rglob("about.json")]
    assert digests == {one["digest"] for one in papers}


@pytest.mark.parametrize(
    "name", ["1.root.json", "timestamp.json", "3.snapshot.json", "2.targets.json", "2.exercise.json"]
)
def test_a_changed_byte_of_any_metadata_is_named(folder: Path, name: str) -> None:
    """Of what is signed, in a folder that was signed again."""
    path = folder / "repository" / name
    whole = path.read_bytes()
    begin = whole.index(b'"signed":{')
    for at in range(begin + 9, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        resign(folder)
        assert f"repository/{name}" in dict(problems(folder)), at


def test_metadata_that_nothing_leads_to_and_metadata_that_are_missing_are_named(folder: Path) -> None:
    data = (folder / "repository" / "3.snapshot.json").read_bytes()
    (folder / "repository" / "9.snapshot.json").write_bytes(data)

    def listed(head: dict[str, Any]) -> None:
        [one] = [one for one in head["files"] if one["path"] == "repository/3.snapshot.json"]
        head["files"].append({**one, "path": "repository/9.snapshot.json"})

    resign(folder, listed)
    only(folder, "repository/9.snapshot.json", "nothing that is signed leads to it")
    (folder / "repository" / "9.snapshot.json").unlink()
    (folder / "repository" / "2.exercise.json").unlink()

    def without(head: dict[str, Any]) -> None:
        head["files"] = [one for one in head["files"] if (folder / one["path"]).exists()]

    head = json.loads((folder / "manifest.json").read_bytes())
    without(head)
    (folder / "manifest.json").write_text(json.dumps(head), encoding="utf-8")
    resign(folder)
    only(folder, "repository/2.exercise.json", "is missing")


@pytest.mark.parametrize("member", ["threshold", "signed", "by"])
def test_who_is_said_to_have_signed_is_who_did(folder: Path, member: str) -> None:
    other: dict[str, Any] = {"threshold": 1, "signed": [], "by": "9.root.json"}
    rewritten(folder, "published.json", lambda found: found["signatures"][0].update({member: other[member]}))
    only(folder, "published.json", "says otherwise than the metadata")


def test_a_published_bundle_under_another_version_is_named(folder: Path) -> None:
    rewritten(folder, "published.json", lambda found: found["targets"][0].update(version="6.6.6"))
    only(folder, "published.json", "says otherwise than the metadata")


# --- the chain by itself ---


def metadata(depot: Depot) -> dict[str, bytes]:
    """As the newest edition has it."""
    found = {path.name: path.read_bytes() for path in depot.layout.metadata.iterdir()}
    told = signature_chain.verify(found, refuse)
    return {one.file: found[one.file] for one in told.signatures}


def refuse(file: str, problem: str) -> None:
    raise AssertionError(f"{file}: {problem}")


def wrong(files: dict[str, bytes]) -> dict[str, str]:
    found: dict[str, str] = {}
    signature_chain.verify(files, found.setdefault)  # type: ignore[arg-type]
    return found


def test_a_chain_of_roots_is_followed_and_none_may_be_missing(tmp_path: Path, depot: Depot, made: Path) -> None:
    depot.publish(made)
    for role in ("timestamp", "snapshot", "root"):
        rotating.rotate(depot.folder, role)
    depot.publish(version(tmp_path, made, "2.0.0"))
    files = metadata(depot)
    told = signature_chain.verify(files, refuse)
    assert [one.version for one in told.signatures if one.role == "root"] == [1, 2, 3, 4]
    assert [(one.name, one.version) for one in told.targets] == [("tiny", "1.0.0"), ("tiny", "2.0.0")]
    del files["3.root.json"]
    assert "is missing" in wrong(files)["3.root.json"]


def test_a_key_that_was_replaced_signs_nothing_any_more(depot: Depot, made: Path) -> None:
    depot.publish(made)
    old = metadata(depot)
    rotating.rotate(depot.folder, "timestamp")
    files = metadata(depot)
    stolen = Metadata.from_bytes(old["timestamp.json"])
    assert "0 of the 1 signatures" in wrong({**files, "timestamp.json": stolen.to_bytes()})["timestamp.json"]


def test_metadata_of_any_bytes_are_named_and_end_nothing(depot: Depot, made: Path) -> None:
    depot.publish(made)
    files = metadata(depot)
    for name, data in files.items():
        for hostile in (b"", b"null", b"[" * 20_000, b'{"signed":{}}', data[:-1]):
            assert name in wrong({**files, name: hostile}), (name, hostile[:20])


def test_no_bit_of_a_timestamp_can_be_changed_unseen(depot: Depot, made: Path) -> None:
    depot.publish(made)
    files = metadata(depot)
    data = files["timestamp.json"]
    told = signature_chain.verify(files, refuse)
    for changed in list(flips(data))[::13]:
        if "timestamp.json" not in wrong({**files, "timestamp.json": changed}):
            # White space, or a way of writing the same.
            assert signature_chain.verify({**files, "timestamp.json": changed}, refuse) == told
