"""Verification of evidence folders: each alteration is named, and a hostile folder is refused cleanly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outstation.evidence.format import manifest
from outstation.evidence.format.contents import READ_LIMITS, ReadLimits
from outstation.evidence.format.manifest import EvidenceManifest, FileEntry, ReceivedSpan, TrustedKey
from outstation.foundation.errors import MessageRefused
from outstation.protocol.wire import jws, log_chain
from outstation.workbench.testing.messages import MessageSender, new_key
from tests.kit.evidences import build_story
from tests.kit.received_evidence import OPERATOR, only, problems, resign, verified, write_manifest

pytest_plugins = ["tests.kit.evidence_fixtures"]

MESSAGES = "messages/part-0001.jsonl"


# --- alterations without the operator's key ---


def test_an_untouched_copy_has_no_problem(folder: Path) -> None:
    assert problems(folder) == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        *("index.html", MESSAGES, "decisions.jsonl", "sbom.cdx.json", "audit.json"),
        *("comparisons.json", "published.json", "repository/1.root.json", "repository/timestamp.json"),
    ],
)
def test_a_flipped_bit_is_named(folder: Path, name: str) -> None:
    flip(folder / name)
    only(folder, name, "was altered: its SHA-256 differs from the manifest")


def test_a_longer_file_is_named_with_its_size(folder: Path) -> None:
    size = (folder / "running.json").stat().st_size
    with (folder / "running.json").open("ab") as file:
        file.write(b" ")
    only(folder, "running.json", f"has {size + 1} bytes, the manifest says {size}")


def test_a_missing_file_or_folder_is_named(folder: Path) -> None:
    (folder / "incidents.csv").unlink()
    only(folder, "incidents.csv", "is listed in the manifest but missing")
    shutil.rmtree(folder / "messages")
    assert (MESSAGES, "is listed in the manifest but missing") in problems(folder)


def test_an_added_file_is_named(folder: Path) -> None:
    (folder / "bundles" / "more.txt").write_text("x")
    only(folder, "bundles/more.txt", "is not listed in the manifest")


def test_a_symbolic_link_to_equal_bytes_is_refused(folder: Path, original: Path) -> None:
    (folder / "audit.json").unlink()
    (folder / "audit.json").symlink_to(original / "audit.json")
    listed = problems(folder)
    assert ("audit.json", "is a symbolic link; an evidence folder has regular files only") in listed


def test_a_linked_folder_is_not_entered(folder: Path, original: Path) -> None:
    shutil.rmtree(folder / "bundles")
    (folder / "bundles").symlink_to(original / "bundles")
    by_file = dict(problems(folder))
    assert by_file["bundles"] == "is a symbolic link; an evidence folder has regular files only"
    assert {problem for where, problem in by_file.items() if where.endswith("about.json")} == {
        "is listed in the manifest but missing"
    }


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_file_does_not_block(folder: Path) -> None:
    (folder / "audit.json").unlink()
    os.mkfifo(folder / "audit.json")
    listed = problems(folder)
    assert ("audit.json", "is a device, pipe or socket; an evidence folder has regular files only") in listed
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    assert "manifest.json" in dict(problems(folder))


def test_deep_folders_are_not_entered(folder: Path) -> None:
    deep = folder / "a" / "b" / "c" / "d" / "e"
    deep.mkdir(parents=True)
    only(folder, "a/b/c/d", "nested deeper than any listed file")


def test_a_file_name_that_is_not_utf8_is_escaped(folder: Path) -> None:
    (folder / os.fsdecode(b"bad-\xff\x1b[2J")).write_text("x")
    [(where, _)] = problems(folder)
    assert where == "bad-\\udcff\\x1b[2J"


def test_nothing_is_read_without_a_valid_signature(folder: Path) -> None:
    token = (folder / "manifest.jws").read_bytes()
    for content, words in (
        (b"", "malformed signature"),
        (b"a.b.c", "malformed signature"),
        (b"x" * 5000, "is larger than"),
        (manifest.KIND.sign_file(new_key(5), (folder / "manifest.json").read_bytes()), "unknown key"),
    ):
        (folder / "manifest.jws").write_bytes(content)
        [(where, problem)] = problems(folder)
        assert where == "manifest.jws"
        assert words in problem
    (folder / "manifest.jws").unlink()
    only(folder, "manifest.jws", "is missing")
    (folder / "manifest.jws").write_bytes(token)
    report = verified(folder, new_key(5).public)
    assert (report.ok, report.files, report.fleet) == (False, 0, "")


def test_any_of_several_given_keys_is_enough(folder: Path) -> None:
    assert verified(folder, new_key(5).public, OPERATOR["key"].public).ok


def test_an_altered_manifest_breaks_its_signature(folder: Path) -> None:
    flip(folder / "manifest.json")
    only(folder, "manifest.jws", "bad signature")


def test_an_operator_signature_of_another_domain_does_not_count(folder: Path) -> None:
    data = (folder / "manifest.json").read_bytes()
    for topic in ("bundle", "outstation/acme/pi-01/cmd", "decision/exercise-1-1"):
        (folder / "manifest.jws").write_text(jws.sign(OPERATOR["key"], topic, data))
        only(folder, "manifest.jws", "other topic")


# --- false claims signed with the operator's key ---


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON document or a list of JSON lines, and sign the folder again."""
    path = folder / name
    if name.endswith(".jsonl"):
        content = [json.loads(line) for line in path.read_text().splitlines()]
        change(content)
        path.write_text("".join(json.dumps(record) + "\n" for record in content))
    else:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    resign(folder)


def first(content: list[dict[str, Any]], **members: Any) -> dict[str, Any]:
    return next(record for record in content if members.items() <= record.items())


def test_a_folder_signed_again_has_no_problem(folder: Path) -> None:
    resign(folder)
    assert problems(folder) == []


def test_a_message_not_signed_by_the_device_is_named_by_line(folder: Path) -> None:
    def change(content: list[dict[str, Any]]) -> None:
        content[4]["payload"] = content[4]["payload"].replace("pi-01", "pi-02")

    edit(folder, MESSAGES, change)
    assert "does not verify: bad signature" in dict(problems(folder))[f"{MESSAGES}:5"]


def test_a_message_of_an_unlisted_key_is_named(folder: Path) -> None:
    def change(head: dict[str, Any]) -> None:
        head["keys"] = [key for key in head["keys"] if key["owner"] != "pi-02"]

    resign(folder, change)
    assert {
        problem.split(",")[0].split("kid")[0] for where, problem in problems(folder) if where.startswith(MESSAGES)
    } == {"does not verify: unknown key: "}


def test_a_message_after_the_replacement_of_its_key_is_named(folder: Path) -> None:
    def change(head: dict[str, Any]) -> None:
        key = next(key for key in head["keys"] if key["owner"] == "pi-04" and "last_valid_seq" in key)
        key["last_valid_seq"] = 1

    resign(folder, change)
    assert any("retired key" in problem for _, problem in problems(folder))


def test_a_message_of_another_fleet_is_named(folder: Path) -> None:
    resign(folder, lambda head: head.update(fleet="other"))
    assert {"does not verify: other fleet: signed for fleet 'acme'"} == {
        problem for where, problem in problems(folder) if where.startswith(MESSAGES)
    }


def test_a_duplicate_or_missing_message_is_named(folder: Path) -> None:
    edit(folder, MESSAGES, lambda content: content.append(content[0]))
    [(_, problem)] = problems(folder)
    assert "duplicates a message: pi-01 log" in problem
    edit(folder, MESSAGES, lambda content: content.pop())
    edit(folder, MESSAGES, lambda content: content.pop(0))
    assert [problem for _, problem in problems(folder) if "refers to a message that is not in messages/" in problem]


def test_consecutive_messages_must_be_chained(folder: Path) -> None:
    """A device signs a seq 1, and a seq 2 that follows a different seq 1."""
    sender = MessageSender("pi-77", new_key(77), "5f0c2f6e-1a54-4d0b-9a53-000000000077")
    forked = MessageSender("pi-77", sender.key, sender.log, prev="x", seq=1)
    messages = (sender.health_with_cursor(), forked.health_with_cursor())
    added = [{"topic": sent.topic, "payload": sent.payload.decode(), "jws": sent.jws} for sent in messages]
    edit(folder, MESSAGES, lambda content: content.extend(added))
    runs = [
        {
            "device": "pi-77",
            "log": sender.log,
            "first": sent.seq,
            "prev": prev,
            "kinds": ["health"],
            "body_hashes": [log_chain.hash_body(sent.payload)],
        }
        for sent, prev in zip(messages, ("", "x"), strict=True)
    ]
    edit(folder, "chains/part-0001.jsonl", lambda content: content.extend(runs))
    public = sender.key.public
    key = {"kid": public.kid, "key": public.text, "role": "device", "owner": "pi-77"}
    resign(folder, lambda head: head["keys"].append(key))
    only(folder, "chains/part-0001.jsonl:6", "seq 2 does not follow the message before it")


CLAIMS: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "an incident that ended earlier": (
        "incidents.json", lambda c: first(c, alert="drift").update(ended="2026-11-12T08:00:00.000000Z"), "time differs",
    ),
    "an incident with another summary": (
        "incidents.json", lambda c: first(c, alert="fault").update(summary="All is well."), "summary differs",
    ),
    "an incident of another device": (
        "incidents.json", lambda c: first(c, alert="fault").update(device="pi-03"), "device differs",
    ),
    "an incident without its message": (
        "incidents.json", lambda c: first(c, alert="fault").update(raised=None), "names no message",
    ),
    "an incident cleared by a message of another kind": (
        "incidents.json", lambda c: first(c, alert="fault").update(cleared=first(c, alert="fault")["raised"]),
        "state differs",
    ),
    "a decision with another summary": (
        "decisions.jsonl", lambda c: first(c, event="key rotated").update(summary="x"), "summary differs",
    ),
    "a decision at another time": (
        "decisions.jsonl", lambda c: first(c, event="activated").update(time="2020-01-01T00:00:00Z"), "time differs",
    ),
    "an operator's decision with another summary": (
        "decisions.jsonl", lambda c: first(c, event="aborted").update(summary="Finished."),
        "summary differs from what the operator signed",
    ),
    "an operator's decision in another roll-out": (
        "decisions.jsonl", lambda c: first(c, event="aborted").update(rollout="exercise-1-1"), "other topic",
    ),
    "an operator's decision without signature": (
        "decisions.jsonl", lambda c: first(c, event="aborted").update(jws="a..b"), "malformed signature",
    ),
    "a running model": (
        "running.json", lambda c: c[0]["model"].update(version="9.9.9"), "model of exercise differs",
    ),
    "the start of a running model": (
        "running.json", lambda c: c[0].update(since="2020-01-01T00:00:00.000000Z"), "time differs",
    ),
    "a metric": (
        "accuracy.json", lambda c: c[0]["metrics"][0].update(value=0.99), "metrics differs",
    ),
    "accuracy without its message": (
        "accuracy.json", lambda c: c[0].update(message=None), "names no message in which the device reported it",
    ),
    "a malformed file": ("running.json", lambda c: c.append(5), "is malformed"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_that_differs_from_its_message_is_named(folder: Path, name: str) -> None:
    file, change, words = CLAIMS[name]
    edit(folder, file, change)
    listed = problems(folder)
    assert [where for where, problem in listed if words in problem and where.startswith(file)], listed


def test_a_decision_removed_from_its_chain_is_missed(folder: Path) -> None:
    edit(folder, "decisions.jsonl", lambda c: c.remove(first(c, event="promoted")))
    assert [problem for _, problem in problems(folder)] == [
        "roll-out exercise-1-1: the decision before number 3 is missing"
    ]
    edit(folder, "decisions.jsonl", lambda c: c.remove(first(c, rollout="exercise-1-2", event="started")))
    assert "roll-out exercise-1-2: decisions before number 2 are missing" in [
        problem for _, problem in problems(folder)
    ]


def test_a_duplicate_decision_is_named(folder: Path) -> None:
    edit(folder, "decisions.jsonl", lambda c: c.append(first(c, event="aborted")))
    only(folder, "decisions.jsonl", "roll-out exercise-1-2: decision 2 occurs twice")


def bundle_folder(folder: Path) -> str:
    about = min(folder.rglob("about.json"))
    return str(about.parent.relative_to(folder))


def test_documents_of_another_bundle_are_named(folder: Path) -> None:
    home = bundle_folder(folder)
    (folder / home / "MODEL_CARD.md").write_text("# It is perfect")
    resign(folder)
    only(folder, f"{home}/MODEL_CARD.md", "belongs to another bundle")


def test_an_altered_bundle_manifest_is_named(folder: Path) -> None:
    home = bundle_folder(folder)
    path = folder / home / "manifest.json"
    path.write_bytes(path.read_bytes() + b" ")
    resign(folder)
    named = [problem for where, problem in problems(folder) if where == f"{home}/about.json"]
    assert "digest differs from that of the bundle's manifest.json" in named
    assert any("does not verify: bad signature" in problem for problem in named)


def test_a_card_of_another_name_or_signer_is_named(folder: Path) -> None:
    about = f"{bundle_folder(folder)}/about.json"
    edit(folder, about, lambda card: card.update(name="other", signer="somebody"))
    named = [problem for _, problem in problems(folder)]
    assert any("names other 1.0.0, but the bundle's manifest is of exercise 1.0.0" in problem for problem in named)
    assert any("names somebody as the signer" in problem for problem in named)
    (folder / bundle_folder(folder) / "manifest.json").unlink()
    assert (about, "its bundle's manifest.json is missing") in problems(folder)


def test_files_and_lines_above_the_limits_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "outstation.evidence.verify.reader.READ_LIMITS", ReadLimits(document_bytes=100, line_bytes=1000)
    )
    named = [problem for _, problem in problems(folder)]
    assert any("is larger than 100 bytes, the limit for such a file" in problem for problem in named)
    assert any("is longer than 1000 bytes; the rest is not read" in problem for problem in named)


def test_messages_above_the_limit_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outstation.evidence.verify.verify.READ_LIMITS", ReadLimits(messages=5))
    report = verified(folder)
    assert report.messages == 5
    assert any("exceeds 5 messages in total" in entry["problem"] for entry in report.problems)


def test_a_huge_file_is_not_read_beyond_its_signed_size(folder: Path) -> None:
    with (folder / "audit.json").open("r+b") as file:
        file.truncate(1 << 40)
    [(where, problem)] = problems(folder)
    assert (where, problem.split(",")[0]) == ("audit.json", f"has {1 << 40} bytes")


# --- manifests ---


def head(**changes: Any) -> dict[str, Any]:
    empty = EvidenceManifest(
        v=1, kind="evidence", fleet="acme", as_of="2026-11-24T22:18:01Z", agent="0.1.0", span=ReceivedSpan(None, None),
        messages=0, omitted={}, keys=[], files=[],
    )  # fmt: skip
    return {**msgspec.to_builtins(empty), **changes}


def listed(path: str, size: int = 0) -> dict[str, Any]:
    return {"path": path, "size": size, "sha256": "0" * 64}


HOSTILE_PATHS = [
    "../x", "/etc/passwd", "a/../../x", "a//b", "", ".", "..", "a/./b", "a\\b", "C:\\x", "a\x00b", "é", ".hidden",
    "a/b/c/d/e", "a/", "x" * 300, "manifest.json", "manifest.jws", "-rf", "con\n",
]  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_an_invalid_path_is_refused(folder: Path, path: str) -> None:
    data = json.dumps(head(files=[listed(path)])).encode()
    with pytest.raises(MessageRefused):
        manifest.decode(data)
    write_manifest(folder, data)
    [(where, _)] = problems(folder)
    assert where == "manifest.json"


HOSTILE_KEY = {"kid": "x", "key": new_key(1).public.text, "role": "device", "owner": "pi-01"}
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a duplicate path": ({"files": [listed("a"), listed("a")]}, "listed twice"),
    "paths that differ in case only": ({"files": [listed("a"), listed("A")]}, "listed twice"),
    "a path in a file": ({"files": [listed("a"), listed("a/b")]}, "lies in a path that is listed as a file"),
    "a huge file": ({"files": [listed("a", READ_LIMITS.file_bytes + 1)]}, "the limit is"),
    "a huge sum": ({"files": [listed(f"a{i}", READ_LIMITS.file_bytes) for i in range(5)]}, "all files together"),
    "too many files": ({"files": [listed(f"a{i}") for i in range(READ_LIMITS.files + 1)]}, "malformed manifest"),
    "a negative size": ({"files": [listed("a", -1)]}, "malformed manifest"),
    "another version": ({"v": 2}, "malformed manifest"),
    "another kind": ({"kind": "bundle"}, "malformed manifest"),
    "an unknown member": ({"more": 1}, "malformed manifest"),
    "a key with another kid": ({"keys": [HOSTILE_KEY]}, "is not the key's thumbprint"),
    "a key of small order": ({"keys": [{**HOSTILE_KEY, "key": "A" * 43}]}, "small order"),
    "a duplicate key": ({"keys": [{**HOSTILE_KEY, "kid": new_key(1).public.kid}] * 2}, "listed twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_with_a_reason(name: str) -> None:
    changes, words = HOSTILE[name]
    with pytest.raises(MessageRefused, match=words):
        manifest.decode(json.dumps(head(**changes)).encode())


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"v":1,"v":1}', b" " * (READ_LIMITS.manifest_bytes + 1)],
    ids=["empty", "cut", "list", "no text", "deep", "key twice", "too large"],
)
def test_malformed_manifests_are_refused(data: bytes) -> None:
    with pytest.raises(MessageRefused):
        manifest.decode(data)


def test_a_duplicate_member_is_refused() -> None:
    data = json.dumps(head()).encode().replace(b'"fleet": "acme"', b'"fleet": "evil", "fleet": "acme"')
    with pytest.raises(MessageRefused, match="duplicate key 'fleet' in one object"):
        manifest.decode(data)


NAMES = st.from_regex(r"[a-z0-9_][a-z0-9._+-]{0,8}", fullmatch=True)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
FILES = st.lists(st.tuples(PATHS, st.integers(0, 1000), st.binary(min_size=32, max_size=32)), max_size=6)
OWNERS = st.sampled_from(["pi-01", "pi-02", "operator"])


@given(files=FILES, seeds=st.sets(st.integers(1, 50), max_size=4), owner=OWNERS, left=st.integers(1, 99))
def test_manifests_round_trip_and_paths_stay_inside_the_folder(
    files: list[tuple[str, int, bytes]], seeds: set[int], owner: str, left: int
) -> None:
    keys = [
        TrustedKey(k.kid, k.text, "device", owner, last_valid_seq=left)
        for k in (new_key(seed).public for seed in seeds)
    ]
    written = EvidenceManifest(
        v=1, kind="evidence", fleet="acme", as_of="2026-11-24T22:18:01Z", agent="0.1.0", span=ReceivedSpan(None, None),
        messages=0, omitted={"incidents": left}, keys=keys,
        files=[FileEntry(path, size, data.hex()) for path, size, data in files],
    )  # fmt: skip
    data = manifest.encode(written)
    names = [path.lower() for path, _, _ in files]
    nested = any(name != other and name.startswith(other + "/") for name in names for other in names)
    if nested or len(set(names)) < len(names) or {"manifest.json", "manifest.jws"} & set(names):
        with pytest.raises(MessageRefused):
            manifest.decode(data)
        return
    parsed = manifest.decode(data)
    assert parsed == written
    root = Path("/a/b/c/d/e")
    for file in parsed.files:
        assert os.path.normpath(root / file.path) == str(root / file.path)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["v", "kind", "fleet", "as_of", "agent", "span", "messages", "omitted", "keys", "files"]), inner
    ),
    max_leaves=20,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_arbitrary_bytes_raise_message_refused_only(data: bytes) -> None:
    with pytest.raises(MessageRefused):
        manifest.decode(data)


PARSED = ["decisions.jsonl", "incidents.json", "running.json", "accuracy.json", MESSAGES]
BITS = [b'"', b"{", b"[[", b"null", b"-1", b"9" * 30, b"\xff", b"\\ud800", b'"device":"pi-02",', b"\n", b"\x00"]


@settings(max_examples=25, deadline=None)
@given(file=st.sampled_from(PARSED), at=st.floats(0, 1), cut=st.integers(0, 40), put=st.sampled_from(BITS))
def test_arbitrary_signed_changes_never_break_verification(
    original: Path, tmp_path_factory: pytest.TempPathFactory, file: str, at: float, cut: int, put: bytes
) -> None:
    folder = Path(shutil.copytree(original, tmp_path_factory.mktemp("any") / "received"))
    data = (folder / file).read_bytes()
    offset = int(at * len(data))
    (folder / file).write_bytes(data[:offset] + put + data[offset + cut :])
    resign(folder)
    report = verified(folder)
    assert report.problem_count >= len(report.problems)
    assert report.files == len(json.loads((folder / "manifest.json").read_bytes())["files"])
    shutil.rmtree(folder.parent)


# --- the audit's verdict ---


def test_a_folder_made_of_an_altered_table_does_not_verify(tmp_path: Path) -> None:
    story = build_story(tmp_path / "acme")
    with story.store.transaction() as db:
        assert db.execute("UPDATE metrics SET value = 0.999 WHERE source = 'device'").rowcount > 0
    evidence = story.make(tmp_path / "out")
    story.store.close()
    assert not evidence.facts.audit["passed"]
    report = verified(tmp_path / "out", story.operator.public)
    [problem] = report.problems
    assert (report.ok, problem["file"]) == (False, "audit.json")
    assert "the audit of the database failed when this folder was made" in problem["problem"]


@pytest.mark.parametrize(
    "change",
    [
        {"passed": False},
        {"invalid_count": 1},
        {"undeclared_gaps": 1},
        {"duplicates": 2},
        {"invalid_decisions_count": 1},
    ],
)
def test_an_audit_that_failed_or_contradicts_itself_does_not_verify(folder: Path, change: dict[str, Any]) -> None:
    edit(folder, "audit.json", lambda content: content.update(change))
    only(folder, "audit.json", "the audit of the database failed")


def test_a_folder_without_its_audit_does_not_verify(folder: Path) -> None:
    (folder / "audit.json").unlink()
    resign_without(folder, "audit.json")
    only(folder, "audit.json", "is missing")


def resign_without(folder: Path, name: str) -> None:
    """Sign the folder again as a dishonest operator who leaves a file out."""
    head = json.loads((folder / "manifest.json").read_bytes())
    head["files"] = [file for file in head["files"] if file["path"] != name]
    write_manifest(folder, json.dumps(head).encode())
