"""Proofs in an evidence folder: comparisons of bundles, and signatures of published bundles. No byte can be changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tuf.api.metadata import Metadata

from outstation.evidence.gather.comparisons import compare_messages
from outstation.evidence.verify.verify import verify
from outstation.fleet.repository import key_rotation, signature_chain
from outstation.ml.comparison.tally import EMPTY_STATS
from outstation.protocol.wire.messages import ShadowPayload
from outstation.protocol.wire.verification import decode
from outstation.workbench.testing.messages import MessageSender, SignedMessage
from tests.kit.damage import flips
from tests.kit.received_evidence import OPERATOR, only, problems, resign
from tests.kit.repositories import Depot, version

pytest_plugins = ["tests.kit.repository_fixtures", "tests.kit.evidence_fixtures"]


def rewrite(folder: Path, file: str, change: Callable[[Any], object]) -> None:
    """Change a document and sign the folder again, as a dishonest operator could."""
    document = json.loads((folder / file).read_bytes())
    change(document)
    (folder / file).write_text(json.dumps(document), encoding="utf-8")
    resign(folder)


# --- comparisons ---


def test_comparisons_have_intervals_and_are_recomputed(folder: Path) -> None:
    report = verify(folder, [OPERATOR["key"].public])
    comparisons = json.loads((folder / "comparisons.json").read_bytes())
    assert (report.ok, report.comparisons) == (True, 4)
    assert [pair["device"] for pair in comparisons] == ["pi-01", "pi-02", "pi-03", "pi-04"]
    first, second = comparisons[0], comparisons[1]
    assert first["metrics"][0] == {"name": "agreement", "value": None, "low": None, "high": None, "n": 0}
    metrics = {metric["name"]: metric for metric in second["metrics"]}
    assert (second["new"]["version"], second["old"]["version"]) == ("1.1.0", "1.0.0")
    assert (second["windows"], second["agreeing"], second["labelled"]) == (1200, 1140, 120)
    assert metrics["agreement"]["low"] < metrics["agreement"]["value"] == 0.95 < metrics["agreement"]["high"]
    assert metrics["latency_ratio"]["value"] == pytest.approx(0.8)
    assert metrics["accuracy_gain"]["value"] == pytest.approx(0.1)
    assert metrics["estimated_accuracy_gain"]["value"] == pytest.approx(0.02)


def test_a_comparison_in_several_messages_has_the_numbers_of_one_in_a_single_message() -> None:
    sender, split = MessageSender(), list[ShadowPayload]()
    sent = [decode(compare_outputs(sender, i).payload) for i in range(12)]
    whole = [body for body in sent if isinstance(body, ShadowPayload)]
    empty = {"batches": 0, "n": 0, "agreeing": 0, "stats": EMPTY_STATS, "other_stats": EMPTY_STATS}
    for body in whole:
        parts = [replace(body, outputs={name: part}, **empty) for name, part in body.outputs.items()]
        split += [replace(body, outputs={}), *parts]
    expected, actual = (compare_messages(messages, new_is_shadow=True) for messages in (whole, split))
    assert replace(actual, messages=[]) == replace(expected, messages=[])
    assert [metric.name for metric in actual.metrics if metric.low is None] == ["wear/agreement"]
    assert {"wear/error_ratio", "flags/agreement"} < {metric.name for metric in actual.metrics}


def compare_outputs(sender: MessageSender, i: int) -> SignedMessage:
    """Return a comparison of the first output and two further ones, in one message."""
    old, new = ({"windows": 100, "seconds": 0.0, "abs_error": {"n": 9, "mean": m + i, "m2": 1.0}} for m in (1.0, 1.1))
    side = {"windows": 100, "seconds": 0.0}
    wear = {"n": 100, "agreeing": None, "stats": old, "other_stats": new}
    flags = {"n": 100, "agreeing": 90 + i % 5, "stats": side, "other_stats": side}
    return sender.shadow(agreeing=95 + i % 3, outputs={"wear": wear, "flags": flags})


@pytest.mark.parametrize("name", ["windows", "agreeing", "batches", "errors", "labelled"])
def test_a_count_that_the_messages_contradict_is_named(folder: Path, name: str) -> None:
    rewrite(folder, "comparisons.json", lambda pairs: pairs[1].update({name: pairs[1][name] + 1}))
    only(folder, "comparisons.json[1]", f"{name} differs from the value computed from its 12 messages")


def test_an_interval_that_the_messages_contradict_is_named(folder: Path) -> None:
    rewrite(folder, "comparisons.json", lambda pairs: pairs[1]["metrics"][0].update(low=0.949))
    only(folder, "comparisons.json[1]", "metrics differs from the value computed from its 12 messages")


def test_a_comparison_with_swapped_bundles_is_named(folder: Path) -> None:
    rewrite(folder, "comparisons.json", lambda pairs: pairs[1].update(new_is_shadow=False))
    assert {where for where, _ in problems(folder)} == {"comparisons.json[1]"}


def test_a_comparison_of_two_devices_is_refused(folder: Path) -> None:
    rewrite(folder, "comparisons.json", lambda pairs: pairs[1]["messages"].extend(pairs[2]["messages"]))
    only(folder, "comparisons.json[1]", "combines messages of different devices")


def test_a_message_counted_twice_is_named(folder: Path) -> None:
    rewrite(folder, "comparisons.json", lambda pairs: pairs[1]["messages"].append(pairs[1]["messages"][0]))
    only(folder, "comparisons.json[1]", "counts a message twice")


def test_a_comparison_refers_to_shadow_messages_only(folder: Path) -> None:
    health = json.loads((folder / "running.json").read_bytes())[1]["health"]
    rewrite(folder, "comparisons.json", lambda pairs: pairs[1]["messages"].append(health))
    only(folder, "comparisons.json[1]", "which is of kind health")


def test_a_changed_byte_of_a_shadow_message_is_named(folder: Path) -> None:
    [part] = (folder / "messages").iterdir()
    lines = part.read_text(encoding="utf-8").splitlines(keepends=True)
    number = next(i for i, line in enumerate(lines) if "/shadow/" in line)
    lines[number] = lines[number].replace('\\"agreeing\\":9', '\\"agreeing\\":8', 1)
    part.write_text("".join(lines), encoding="utf-8")
    resign(folder)
    listed = problems(folder)
    assert any(
        where.endswith(f":{number + 1}") and "does not verify: bad signature" in problem for where, problem in listed
    )
    assert any(where.startswith("comparisons.json") for where, _ in listed)


# --- published bundles ---


def test_the_signature_chain_leads_from_the_root_to_each_bundle(folder: Path) -> None:
    report = verify(folder, [OPERATOR["key"].public])
    published = json.loads((folder / "published.json").read_bytes())
    assert [signature["file"] for signature in published["signatures"]] == [
        *("1.root.json", "timestamp.json", "3.snapshot.json", "2.targets.json", "2.exercise.json"),
    ]
    root = published["signatures"][0]
    assert (root["threshold"], len(root["keys"]), root["signed_keys"]) == (2, 2, root["keys"])
    assert report.signatures == 6
    cards = [json.loads(path.read_bytes()) for path in (folder / "bundles").rglob("about.json")]
    assert {target["digest"] for target in published["targets"]} == {card["digest"] for card in cards}


@pytest.mark.parametrize(
    "name", ["1.root.json", "timestamp.json", "3.snapshot.json", "2.targets.json", "2.exercise.json"]
)
def test_a_changed_byte_of_signed_metadata_is_named(folder: Path, name: str) -> None:
    path = folder / "repository" / name
    original = path.read_bytes()
    begin = original.index(b'"signed":{')
    for offset in range(begin + 9, len(original), 97):
        path.write_bytes(original[:offset] + bytes([original[offset] ^ 1]) + original[offset + 1 :])
        resign(folder)
        assert f"repository/{name}" in dict(problems(folder)), offset


def test_extra_and_missing_metadata_are_named(folder: Path) -> None:
    data = (folder / "repository" / "3.snapshot.json").read_bytes()
    (folder / "repository" / "9.snapshot.json").write_bytes(data)

    def add_to_list(head: dict[str, Any]) -> None:
        [entry] = [file for file in head["files"] if file["path"] == "repository/3.snapshot.json"]
        head["files"].append({**entry, "path": "repository/9.snapshot.json"})

    resign(folder, add_to_list)
    only(folder, "repository/9.snapshot.json", "no signed metadata refers to it")
    (folder / "repository" / "9.snapshot.json").unlink()
    (folder / "repository" / "2.exercise.json").unlink()
    head = json.loads((folder / "manifest.json").read_bytes())
    head["files"] = [file for file in head["files"] if (folder / file["path"]).exists()]
    (folder / "manifest.json").write_text(json.dumps(head), encoding="utf-8")
    resign(folder)
    only(folder, "repository/2.exercise.json", "is missing")


@pytest.mark.parametrize("member", ["threshold", "signed_keys", "delegator"])
def test_a_false_signature_claim_is_named(folder: Path, member: str) -> None:
    other: dict[str, Any] = {"threshold": 1, "signed_keys": [], "delegator": "9.root.json"}
    rewrite(folder, "published.json", lambda chain: chain["signatures"][0].update({member: other[member]}))
    only(folder, "published.json", "differs from the signed metadata")


def test_a_published_bundle_under_another_version_is_named(folder: Path) -> None:
    rewrite(folder, "published.json", lambda chain: chain["targets"][0].update(version="6.6.6"))
    only(folder, "published.json", "differs from the signed metadata")


# --- the signature chain alone ---


def metadata(depot: Depot) -> dict[str, bytes]:
    """Return the metadata that the newest edition refers to."""
    files = {path.name: path.read_bytes() for path in depot.layout.metadata.iterdir()}
    return {signature.file: files[signature.file] for signature in signature_chain.verify(files, refuse).signatures}


def refuse(file: str, problem: str) -> None:
    raise AssertionError(f"{file}: {problem}")


def chain_problems(files: dict[str, bytes]) -> dict[str, str]:
    by_file: dict[str, str] = {}
    signature_chain.verify(files, by_file.setdefault)  # type: ignore[arg-type]
    return by_file


def test_no_root_of_the_chain_may_be_missing(tmp_path: Path, depot: Depot, made: Path) -> None:
    depot.publish(made)
    for role in ("timestamp", "snapshot", "root"):
        key_rotation.rotate(depot.folder, role)
    depot.publish(version(tmp_path, made, "2.0.0"))
    files = metadata(depot)
    chain = signature_chain.verify(files, refuse)
    assert [signature.version for signature in chain.signatures if signature.role == "root"] == [1, 2, 3, 4]
    assert [(target.name, target.version) for target in chain.targets] == [("tiny", "1.0.0"), ("tiny", "2.0.0")]
    del files["3.root.json"]
    assert "is missing" in chain_problems(files)["3.root.json"]


def test_a_replaced_key_signs_nothing(depot: Depot, made: Path) -> None:
    depot.publish(made)
    old = metadata(depot)
    key_rotation.rotate(depot.folder, "timestamp")
    files = metadata(depot)
    stolen = Metadata.from_bytes(old["timestamp.json"])
    assert (
        "0 of 1 required signatures" in chain_problems({**files, "timestamp.json": stolen.to_bytes()})["timestamp.json"]
    )


def test_malformed_metadata_are_named(depot: Depot, made: Path) -> None:
    depot.publish(made)
    files = metadata(depot)
    assert len(files) >= 5
    for name, data in files.items():
        for hostile in (b"", b"null", b"[" * 20_000, b'{"signed":{}}', data[:-1]):
            assert name in chain_problems({**files, name: hostile}), (name, hostile[:20])


def test_no_bit_flip_of_a_timestamp_goes_unnoticed(depot: Depot, made: Path) -> None:
    depot.publish(made)
    files = metadata(depot)
    data = files["timestamp.json"]
    chain = signature_chain.verify(files, refuse)
    changes = list(flips(data))[::13]
    silent = [
        changed for changed in changes if "timestamp.json" not in chain_problems({**files, "timestamp.json": changed})
    ]
    # White space, or another encoding of equal content.
    assert len(silent) < len(changes) / 4
    assert all(signature_chain.verify({**files, "timestamp.json": changed}, refuse) == chain for changed in silent)
