"""Verifying an evidence folder: each way of altering one is named, and a hostile one is refused cleanly."""

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

from agent.errors import MessageRefused
from agent.fleet.evidence.format import manifest
from agent.fleet.evidence.format.contents import READ_LIMITS, ReadLimits
from agent.fleet.evidence.format.manifest import EvidenceManifest, FileEntry, ReceivedSpan, TrustedKey
from agent.testing.messages import MessageSender, new_key
from agent.wire import jws
from tests.kit.received_evidence import OPERATOR, only, problems, resign, verified, write_manifest

pytest_plugins = ["tests.kit.evidence_fixtures"]

MESSAGES = "messages/part-0001.jsonl"


# --- what anybody can do to a folder ---


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
def test_one_flipped_bit_of_a_file_is_named(folder: Path, name: str) -> None:
    flip(folder / name)
    only(folder, name, "was altered: its SHA-256 is not the manifest's")


def test_a_longer_and_a_shorter_file_are_named_by_their_sizes(folder: Path) -> None:
    size = (folder / "running.json").stat().st_size
    with (folder / "running.json").open("ab") as file:
        file.write(b" ")
    only(folder, "running.json", f"has {size + 1} bytes, the manifest says {size}")


def test_a_missing_file_and_a_missing_folder_are_named(folder: Path) -> None:
    (folder / "incidents.csv").unlink()
    only(folder, "incidents.csv", "is listed in the manifest, and missing")
    shutil.rmtree(folder / "messages")
    assert (MESSAGES, "is listed in the manifest, and missing") in problems(folder)


def test_a_file_that_was_added_is_named_wherever_it_lies(folder: Path) -> None:
    (folder / "bundles" / "more.txt").write_text("x")
    only(folder, "bundles/more.txt", "is not listed in the manifest")


def test_a_symbolic_link_is_refused_even_to_the_same_bytes(folder: Path, original: Path) -> None:
    (folder / "audit.json").unlink()
    (folder / "audit.json").symlink_to(original / "audit.json")
    found = problems(folder)
    assert ("audit.json", "is a symbolic link; an evidence folder has plain files only") in found


def test_a_linked_folder_is_not_walked_into(folder: Path, original: Path) -> None:
    shutil.rmtree(folder / "bundles")
    (folder / "bundles").symlink_to(original / "bundles")
    found = dict(problems(folder))
    assert found["bundles"] == "is a symbolic link; an evidence folder has plain files only"
    assert {what for where, what in found.items() if where.endswith("about.json")} == {
        "is listed in the manifest, and missing"
    }


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder: Path) -> None:
    (folder / "audit.json").unlink()
    os.mkfifo(folder / "audit.json")
    found = problems(folder)
    assert ("audit.json", "is a device, pipe or socket; an evidence folder has plain files only") in found
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    assert "manifest.json" in dict(problems(folder))


def test_folders_without_end_are_not_followed(folder: Path) -> None:
    deep = folder / "a" / "b" / "c" / "d" / "e"
    deep.mkdir(parents=True)
    only(folder, "a/b/c/d", "deeper than any listed file can lie")


def test_a_name_that_is_no_text_is_shown_escaped(folder: Path) -> None:
    (folder / os.fsdecode(b"bad-\xff\x1b[2J")).write_text("x")
    [(where, _)] = problems(folder)
    assert where == "bad-\\udcff\x1b[2J"


def test_without_signature_with_an_empty_one_and_with_that_of_a_stranger_nothing_is_read(folder: Path) -> None:
    token = (folder / "manifest.jws").read_bytes()
    for content, words in (
        (b"", "malformed signature"),
        (b"a.b.c", "malformed signature"),
        (b"x" * 5000, "is larger than"),
        (manifest.sign((folder / "manifest.json").read_bytes(), new_key(5)), "unknown key"),
    ):
        (folder / "manifest.jws").write_bytes(content)
        [(where, what)] = problems(folder)
        assert where == "manifest.jws"
        assert words in what
    (folder / "manifest.jws").unlink()
    only(folder, "manifest.jws", "is missing")
    (folder / "manifest.jws").write_bytes(token)
    report = verified(folder, new_key(5).public)
    assert (report.ok, report.files, report.fleet) == (False, 0, "")


def test_one_of_several_keys_is_enough(folder: Path) -> None:
    assert verified(folder, new_key(5).public, OPERATOR["key"].public).ok


def test_an_altered_manifest_does_not_fit_its_signature(folder: Path) -> None:
    flip(folder / "manifest.json")
    only(folder, "manifest.jws", "bad signature")


def test_a_signature_of_the_operator_for_something_else_does_not_count(folder: Path) -> None:
    data = (folder / "manifest.json").read_bytes()
    for topic in ("bundle", "outstation/acme/pi-01/cmd", "decision/exercise-1-1"):
        (folder / "manifest.jws").write_text(jws.sign(OPERATOR["key"], topic, data))
        only(folder, "manifest.jws", "other topic")


# --- what the one who signs can do ---


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file, or the list of a file's JSON lines, and sign the folder again."""
    path = folder / name
    if name.endswith(".jsonl"):
        content = [json.loads(line) for line in path.read_text().splitlines()]
        change(content)
        path.write_text("".join(json.dumps(one) + "\n" for one in content))
    else:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    resign(folder)


def set_to(index: int, name: str, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        assert content[index][name] != value
        content[index][name] = value

    return change


def first(content: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    return next(one for one in content if all(one[name] == value for name, value in wanted.items()))


def test_an_honest_folder_that_is_signed_again_has_no_problem(folder: Path) -> None:
    resign(folder)
    assert problems(folder) == []


def test_a_message_that_the_device_did_not_sign_is_named_by_its_line(folder: Path) -> None:
    def change(content: list[dict[str, Any]]) -> None:
        content[4]["payload"] = content[4]["payload"].replace("pi-01", "pi-02")

    edit(folder, MESSAGES, change)
    found = dict(problems(folder))
    assert "does not verify: bad signature" in found[f"{MESSAGES}:5"]


def test_a_message_of_a_key_that_is_not_listed_is_named(folder: Path) -> None:
    def change(head: dict[str, Any]) -> None:
        head["keys"] = [key for key in head["keys"] if key["owner"] != "pi-02"]

    resign(folder, change)
    assert {what.split(",")[0].split("kid")[0] for where, what in problems(folder) if where.startswith(MESSAGES)} == {
        "does not verify: unknown key: "
    }


def test_a_message_after_its_key_was_replaced_is_named(folder: Path) -> None:
    def change(head: dict[str, Any]) -> None:
        first(head["keys"], owner="pi-04")["through"] = 1
        key = next(key for key in head["keys"] if key["owner"] == "pi-04" and "through" in key)
        key["through"] = 1

    resign(folder, change)
    assert any("retired key" in what for _, what in problems(folder))


def test_a_message_of_another_fleet_is_named(folder: Path) -> None:
    resign(folder, lambda head: head.update(fleet="other"))
    assert {"does not verify: other fleet: signed for 'acme'"} == {
        what for where, what in problems(folder) if where.startswith(MESSAGES)
    }


def test_a_message_that_is_there_twice_or_missing_is_named(folder: Path) -> None:
    edit(folder, MESSAGES, lambda content: content.append(content[0]))
    [(_, what)] = problems(folder)
    assert "is there twice: pi-01 log" in what
    edit(folder, MESSAGES, lambda content: content.pop())
    edit(folder, MESSAGES, lambda content: content.pop(0))
    assert [what for _, what in problems(folder) if "relies on a message that is not in messages/" in what]


def test_two_messages_that_follow_each_other_must_be_chained(folder: Path) -> None:
    """A device that signs two stories: seq 1 and a seq 2 that follows another seq 1."""
    story = MessageSender("pi-77", new_key(77), "5f0c2f6e-1a54-4d0b-9a53-000000000077")
    one, other = (
        story.health_with_cursor(),
        MessageSender("pi-77", story.key, story.log, prev="x", seq=1).health_with_cursor(),
    )
    added = [{"topic": sent.topic, "payload": sent.payload.decode(), "jws": sent.jws} for sent in (one, other)]
    edit(folder, MESSAGES, lambda content: content.extend(added))
    public = story.key.public
    key = {"kid": public.kid, "key": public.text, "role": "device", "owner": "pi-77"}
    resign(folder, lambda head: head["keys"].append(key))
    only(folder, "messages/", "seq 2 does not follow the message before it")


CLAIMS: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "an incident that ended earlier": (
        "incidents.json", lambda c: first(c, alert="drift").update(ended="2026-11-12T08:00:00.000000Z"), "another time",
    ),
    "an incident with other words": (
        "incidents.json", lambda c: first(c, alert="fault").update(summary="All is well."), "another summary",
    ),
    "an incident of another device": (
        "incidents.json", lambda c: first(c, alert="fault").update(device="pi-03"), "another device",
    ),
    "an incident without its message": (
        "incidents.json", lambda c: first(c, alert="fault").update(raised=None), "names no message",
    ),
    "an incident cleared by a message of another kind": (
        "incidents.json", lambda c: first(c, alert="fault").update(cleared=first(c, alert="fault")["raised"]),
        "another state",
    ),
    "a decision with other words": (
        "decisions.jsonl", lambda c: first(c, event="key rotated").update(summary="x"), "another summary",
    ),
    "a decision at another time": (
        "decisions.jsonl", lambda c: first(c, event="activated").update(time="2020-01-01T00:00:00Z"), "another time",
    ),
    "an operator's decision with other words": (
        "decisions.jsonl", lambda c: first(c, event="aborted").update(summary="Finished."),
        "says another summary than what the operator signed",
    ),
    "an operator's decision in another roll-out": (
        "decisions.jsonl", lambda c: first(c, event="aborted").update(rollout="exercise-1-1"), "other topic",
    ),
    "an operator's decision that nobody signed": (
        "decisions.jsonl", lambda c: first(c, event="aborted").update(jws="a..b"), "malformed signature",
    ),
    "what runs": (
        "running.json", lambda c: c[0]["model"].update(version="9.9.9"), "another model of exercise",
    ),
    "since when it runs": (
        "running.json", lambda c: c[0].update(since="2020-01-01T00:00:00.000000Z"), "another time",
    ),
    "how accurate it is": (
        "accuracy.json", lambda c: c[0]["metrics"][0].update(value=0.99), "another metrics",
    ),
    "whose accuracy it is": (
        "accuracy.json", lambda c: c[0].update(place=None), "names no message in which the device told it",
    ),
    "a file of another shape": ("running.json", lambda c: c.append(5), "is not what such a file holds"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_folder_says_otherwise_than_what_was_signed_is_named(folder: Path, name: str) -> None:
    file, change, words = CLAIMS[name]
    edit(folder, file, change)
    found = problems(folder)
    assert [where for where, what in found if words in what and where.startswith(file)], found


def test_a_decision_that_is_taken_out_of_the_chain_is_missed(folder: Path) -> None:
    edit(folder, "decisions.jsonl", lambda c: c.remove(first(c, event="promoted")))
    found = [what for _, what in problems(folder)]
    assert found == ["roll-out exercise-1-1: what came before decision 3 is missing"]
    edit(folder, "decisions.jsonl", lambda c: c.remove(first(c, rollout="exercise-1-2", event="started")))
    assert "roll-out exercise-1-2: decisions before number 2 are missing" in [what for _, what in problems(folder)]


def test_a_decision_that_is_there_twice_is_named(folder: Path) -> None:
    edit(folder, "decisions.jsonl", lambda c: c.append(first(c, event="aborted")))
    only(folder, "decisions.jsonl", "roll-out exercise-1-2: decision 2 is there twice")


def bundle_folder(folder: Path) -> str:
    about = min(folder.rglob("about.json"))
    return str(about.parent.relative_to(folder))


def test_papers_of_another_bundle_are_named(folder: Path) -> None:
    home = bundle_folder(folder)
    (folder / home / "MODEL_CARD.md").write_text("# It is perfect")
    resign(folder)
    only(folder, f"{home}/MODEL_CARD.md", "is not the one of this bundle")


def test_a_bundles_manifest_that_was_changed_has_another_digest_and_no_signature(folder: Path) -> None:
    home = bundle_folder(folder)
    path = folder / home / "manifest.json"
    path.write_bytes(path.read_bytes() + b" ")
    resign(folder)
    found = [what for where, what in problems(folder) if where == f"{home}/about.json"]
    assert "says another digest than its bundle's manifest.json has" in found
    assert any("is said to be signed by a publisher that is listed, and is not: bad signature" in one for one in found)


def test_a_bundle_of_another_name_or_without_its_manifest_is_named(folder: Path) -> None:
    about = f"{bundle_folder(folder)}/about.json"
    edit(folder, about, lambda card: card.update(name="other", signer="somebody"))
    found = [what for _, what in problems(folder)]
    assert any("says other 1.0.0, the bundle's manifest exercise 1.0.0" in one for one in found)
    assert any("says that somebody signed it" in one for one in found)
    (folder / bundle_folder(folder) / "manifest.json").unlink()
    only_missing = [what for where, what in problems(folder) if where == about]
    assert "its bundle's manifest.json is missing" in only_missing


def test_what_is_too_much_to_read_is_refused_and_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "agent.fleet.evidence.verify.reader.READ_LIMITS", ReadLimits(document_bytes=100, line_bytes=1000)
    )
    found = [what for _, what in problems(folder)]
    assert any("is larger than 100 bytes, the limit for such a file" in one for one in found)
    assert any("is longer than 1000 bytes; the rest is not read" in one for one in found)


def test_more_messages_than_are_looked_at_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.fleet.evidence.verify.verify.READ_LIMITS", ReadLimits(messages=5))
    report = verified(folder)
    assert report.messages == 5
    assert any("more than 5 messages in all" in one["problem"] for one in report.problems)


def test_a_file_that_is_said_to_be_huge_is_not_read_beyond_what_was_signed(folder: Path) -> None:
    with (folder / "audit.json").open("r+b") as file:
        file.truncate(1 << 40)
    [(where, what)] = problems(folder)
    assert (where, what.split(",")[0]) == ("audit.json", f"has {1 << 40} bytes")


# --- manifests ---


def head(**changes: Any) -> dict[str, Any]:
    made = EvidenceManifest(
        v=1, kind="evidence", fleet="acme", at="2026-11-24T22:18:01Z", agent="0.1.0", span=ReceivedSpan(None, None),
        messages=0, left_out={}, keys=[], files=[],
    )  # fmt: skip
    return {**msgspec.to_builtins(made), **changes}


def listed(path: str, size: int = 0) -> dict[str, Any]:
    return {"path": path, "size": size, "sha256": "0" * 64}


HOSTILE_PATHS = [
    "../x", "/etc/passwd", "a/../../x", "a//b", "", ".", "..", "a/./b", "a\\b", "C:\\x", "a\x00b", "é", ".hidden",
    "a/b/c/d/e", "a/", "x" * 300, "manifest.json", "manifest.jws", "-rf", "con\n",
]  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_a_path_that_no_file_of_a_folder_may_have_is_refused(folder: Path, path: str) -> None:
    data = json.dumps(head(files=[listed(path)])).encode()
    with pytest.raises(MessageRefused):
        manifest.decode(data)
    write_manifest(folder, data)
    [(where, _)] = problems(folder)
    assert where == "manifest.json"


HOSTILE_KEY = {"kid": "x", "key": new_key(1).public.text, "role": "device", "owner": "pi-01"}
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "twice": ({"files": [listed("a"), listed("a")]}, "listed twice"),
    "the same but for case": ({"files": [listed("a"), listed("A")]}, "listed twice"),
    "in a file": ({"files": [listed("a"), listed("a/b")]}, "lies in what is listed as a file"),
    "huge": ({"files": [listed("a", READ_LIMITS.file_bytes + 1)]}, "the limit is"),
    "huge together": ({"files": [listed(f"a{i}", READ_LIMITS.file_bytes) for i in range(5)]}, "all files together"),
    "many": ({"files": [listed(f"a{i}") for i in range(READ_LIMITS.files + 1)]}, "malformed manifest"),
    "negative": ({"files": [listed("a", -1)]}, "malformed manifest"),
    "another version": ({"v": 2}, "malformed manifest"),
    "another kind": ({"kind": "bundle"}, "malformed manifest"),
    "an unknown member": ({"more": 1}, "malformed manifest"),
    "a key under another name": ({"keys": [HOSTILE_KEY]}, "is not the key's thumbprint"),
    "a key of small order": ({"keys": [{**HOSTILE_KEY, "key": "A" * 43}]}, "small order"),
    "a key twice": ({"keys": [{**HOSTILE_KEY, "kid": new_key(1).public.kid}] * 2}, "listed twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_with_what_is_wrong(name: str) -> None:
    changes, words = HOSTILE[name]
    with pytest.raises(MessageRefused, match=words):
        manifest.decode(json.dumps(head(**changes)).encode())


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"v":1,"v":1}', b" " * (READ_LIMITS.manifest_bytes + 1)],
    ids=["empty", "cut", "list", "no text", "deep", "key twice", "too large"],
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(MessageRefused):
        manifest.decode(data)


def test_a_key_that_is_there_twice_in_an_object_is_refused() -> None:
    data = json.dumps(head()).encode().replace(b'"fleet": "acme"', b'"fleet": "evil", "fleet": "acme"')
    with pytest.raises(MessageRefused, match="is there twice in one object"):
        manifest.decode(data)


NAMES = st.from_regex(r"[a-z0-9_][a-z0-9._+-]{0,8}", fullmatch=True)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
FILES = st.lists(st.tuples(PATHS, st.integers(0, 1000), st.binary(min_size=32, max_size=32)), max_size=6)
OWNERS = st.sampled_from(["pi-01", "pi-02", "operator"])


@given(files=FILES, seeds=st.sets(st.integers(1, 50), max_size=4), owner=OWNERS, left=st.integers(1, 99))
def test_a_manifest_is_read_as_it_was_written_and_paths_lead_nowhere_else(
    files: list[tuple[str, int, bytes]], seeds: set[int], owner: str, left: int
) -> None:
    keys = [TrustedKey(k.kid, k.text, "device", owner, through=left) for k in (new_key(seed).public for seed in seeds)]
    made = EvidenceManifest(
        v=1, kind="evidence", fleet="acme", at="2026-11-24T22:18:01Z", agent="0.1.0", span=ReceivedSpan(None, None),
        messages=0, left_out={"incidents": left}, keys=keys,
        files=[FileEntry(path, size, data.hex()) for path, size, data in files],
    )  # fmt: skip
    data = manifest.encode(made)
    names = [path.lower() for path, _, _ in files]
    within = any(one != other and one.startswith(other + "/") for one in names for other in names)
    if within or len(set(names)) < len(names) or {"manifest.json", "manifest.jws"} & set(names):
        with pytest.raises(MessageRefused):
            manifest.decode(data)
        return
    found = manifest.decode(data)
    assert found == made
    root = Path("/a/b/c/d/e")
    for one in found.files:
        assert os.path.normpath(root / one.path) == str(root / one.path)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["v", "kind", "fleet", "at", "agent", "span", "messages", "left_out", "keys", "files"]), inner
    ),
    max_leaves=20,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_bytes_are_refused_and_never_raise_anything_else(data: bytes) -> None:
    with pytest.raises(MessageRefused):
        manifest.decode(data)


PARSED = ["decisions.jsonl", "incidents.json", "running.json", "accuracy.json", MESSAGES]
BITS = [b'"', b"{", b"[[", b"null", b"-1", b"9" * 30, b"\xff", b"\\ud800", b'"device":"pi-02",', b"\n", b"\x00"]


@settings(max_examples=60, deadline=None)
@given(file=st.sampled_from(PARSED), at=st.floats(0, 1), cut=st.integers(0, 40), put=st.sampled_from(BITS))
def test_whatever_an_operator_signs_is_judged_and_breaks_nothing(
    original: Path, tmp_path_factory: pytest.TempPathFactory, file: str, at: float, cut: int, put: bytes
) -> None:
    folder = Path(shutil.copytree(original, tmp_path_factory.mktemp("any") / "received"))
    data = (folder / file).read_bytes()
    place = int(at * len(data))
    (folder / file).write_bytes(data[:place] + put + data[place + cut :])
    resign(folder)
    report = verified(folder)
    assert report.problem_count >= len(report.problems)
    assert report.files == len(json.loads((folder / "manifest.json").read_bytes())["files"])
    shutil.rmtree(folder.parent)
