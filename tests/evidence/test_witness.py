"""Evidence against an operator who has every key of the fleet: heads that devices signed find what was rewritten."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.evidence.verify.reader import VerificationReport
from outstation.evidence.verify.stamps import Witnesses
from outstation.evidence.verify.verify import verify
from outstation.foundation.errors import MessageRefused
from outstation.protocol.documents import log_head
from outstation.protocol.wire import log_chain
from outstation.protocol.wire.keys import SigningKey
from outstation.workbench.testing.messages import FLEET, MessageSender, SignedMessage, new_key
from tests.kit.evidences import Story, alert, at
from tests.kit.received_evidence import OPERATOR, resign

pytestmark = pytest.mark.attack("history")

LOG = "5f0c2f6e-1a54-4d0b-9a53-000000000007"
MONTH_H = 30 * 24


def sender(device: str = "pi-07", key: int = 7, log: str = LOG) -> MessageSender:
    return MessageSender(device, new_key(key), log)


def write_log(device: MessageSender, *, since: float = 0, incident: bool = True) -> list[SignedMessage]:
    """Return a device's log of eleven messages, or ten without its incident."""
    log = [device.results(time=at(since + hour)) for hour in range(4)]
    if incident:
        log.append(alert(device, "ax/fault/1", "raised", since + 4, "ax: repeats one value."))
    log += [device.results(time=at(since + hour)) for hour in range(5, 10)]
    return [*log, device.append("health", streams={}, tasks={}, agent="0.1.0", time=at(since + 10))]


def head_of(device: MessageSender, *, hours: float = 11, key: SigningKey | None = None, **changes: Any) -> bytes:
    """Return the file that `outstation head --json` writes on the device."""
    signer = key or device.key
    members: dict[str, Any] = {"fleet": FLEET, "device": device.device, "log": device.log, "seq": device.seq}
    members |= {"digest": device.prev, "time": at(hours), "clock": "synced", "key": signer.public.text}
    return log_head.sign(log_head.LogHead(**(members | changes)), signer).to_json()


class Desk:
    """An operator: `show` makes the folder of a database that holds exactly these messages."""

    def __init__(self, home: Path) -> None:
        self._home, self._count = home, 0

    def show(self, *logs: tuple[MessageSender, Sequence[SignedMessage]], until: float = 12, **sources: Any) -> Path:
        self._count += 1
        story = Story.begin(self._home / str(self._count) / "acme")
        # The operator's key is the same in all of them.
        OPERATOR["key"] = OPERATOR.get("witness") or OPERATOR.setdefault("witness", story.operator)
        story.operator = OPERATOR["key"]
        for device, messages in logs:
            story.store.enrol(device.device, device.key.public, replace=False, now=at(-1))
            story.collect(device, *messages, hours=until)
        out = self._home / f"shown-{self._count}"
        story.make(out, **sources)
        story.store.close()
        return out


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def check(folder: Path, *heads: bytes) -> VerificationReport:
    witnesses = [(f"head-{number}", head) for number, head in enumerate(heads)]
    return verify(folder, [OPERATOR["key"].public], Witnesses(witnesses))


def problems(folder: Path, *heads: bytes) -> list[str]:
    return [f"{entry['file']} {entry['problem']}" for entry in check(folder, *heads).problems]


def assert_only_the_head_tells(folder: Path, head: bytes, words: str) -> None:
    """Assert that the folder alone has no problem, and that the head shows exactly this one."""
    assert problems(folder) == []
    [problem] = problems(folder, head)
    assert problem.startswith("head-0 ")
    assert words in problem


def test_an_honest_operators_folder_agrees_with_every_head(desk: Desk) -> None:
    device, heads, messages = sender(), [], []
    for message in write_log(device):
        messages.append(message)
        copy = msgspec.structs.replace(device, seq=message.seq, prev=log_chain.digest(message.payload))
        heads.append(head_of(copy))
    report = check(desk.show((device, messages)), *heads, head_of(device, seq=0, digest=""))
    assert (report.problems, report.witnesses, report.chained_messages, report.gaps) == ([], 12, 11, 0)


def test_an_operator_who_rewrites_a_devices_log_is_detected_by_its_head(desk: Desk) -> None:
    device, forger = sender(), sender()
    write_log(device)
    # With a copy of the device's key: a month back, and without its incident.
    forged = write_log(forger, since=-MONTH_H, incident=False)
    forged.append(forger.append("health", streams={}, tasks={}, agent="0.1.0", time=at(11 - MONTH_H)))
    assert_only_the_head_tells(desk.show((forger, forged)), head_of(device), "the log was rewritten")


def test_an_operator_who_rewrites_a_log_under_a_new_log_id_is_detected_by_its_head(desk: Desk) -> None:
    device, forger = sender(), sender(log="5f0c2f6e-1a54-4d0b-9a53-000000000008")
    write_log(device)
    assert_only_the_head_tells(
        desk.show((forger, write_log(forger, incident=False))), head_of(device), "the operator deleted it"
    )


@pytest.mark.attack("history", control=True)
def test_without_a_head_a_log_that_was_written_anew_verifies(desk: Desk) -> None:
    device, forger = sender(), sender(key=9)
    write_log(device)
    forged = write_log(forger, since=-MONTH_H, incident=False)
    report = check(desk.show((forger, forged)))
    assert (report.problems, report.chained_messages) == ([], len(forged))


def test_an_operator_who_cuts_off_the_newest_messages_is_detected_by_the_head(desk: Desk) -> None:
    device = sender()
    messages = write_log(device)
    folder = desk.show((device, messages[:-7]))
    assert_only_the_head_tells(
        folder, head_of(device), "covers seq 11, but the log ends at seq 4 here: the operator cut off"
    )


def test_an_operator_who_deletes_a_device_is_detected_by_its_head(desk: Desk) -> None:
    device, other = sender(), sender("pi-08", 8, "5f0c2f6e-1a54-4d0b-9a53-000000000009")
    write_log(device)
    assert_only_the_head_tells(desk.show((other, write_log(other))), head_of(device), "the operator deleted the device")


def test_an_operator_who_enrols_another_key_in_a_devices_name_is_detected_by_its_head(desk: Desk) -> None:
    device, forger = sender(), sender(key=9)
    write_log(device)
    assert_only_the_head_tells(
        desk.show((forger, write_log(forger, incident=False))), head_of(device), "enrolled another key in its name"
    )


def test_an_operator_who_swaps_a_message_between_genuine_ones_is_detected_by_the_head(desk: Desk) -> None:
    """Its database fails the audit, and its folder lies about that; the later messages are the genuine ones."""
    device, forger = sender(), sender()
    messages = write_log(device)
    folder = desk.show((device, messages))
    rewrite(folder, lambda run: run["body_hashes"].__setitem__(2, log_chain.hash_body(forger.results().payload)))
    assert any("the log was rewritten" in problem for problem in problems(folder))
    [problem] = [problem for problem in problems(folder, head_of(device)) if problem.startswith("head-0")]
    assert "the log was rewritten" in problem


def test_an_operator_who_hides_the_chain_is_detected_without_a_head(desk: Desk) -> None:
    device = sender()
    folder = desk.show((device, write_log(device)))
    resign(folder, lambda head: head.update(files=[f for f in head["files"] if "chains" not in f["path"]]))
    (folder / "chains" / "part-0001.jsonl").unlink()
    (folder / "chains").rmdir()
    assert any("the folder has no message of log" in problem for problem in problems(folder))


def rewrite(folder: Path, change: Any) -> None:
    """Change a run of a chain and sign the folder again."""
    path = folder / "chains" / "part-0001.jsonl"
    runs = [json.loads(line) for line in path.read_bytes().splitlines()]
    change(runs[0])
    path.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
    resign(folder)


def quoting(device: MessageSender, through: MessageSender, hours: float, ack_hours: float) -> SignedMessage:
    """Return a health message that quotes the acknowledgement of everything in `through`."""
    quoted = {"kid": "collector", "log": through.log, "through": through.seq, "time": at(ack_hours)}
    quoted["digest"] = through.prev
    return device.append("health", streams={}, tasks={}, agent="0.1.0", acknowledged=quoted, time=at(hours))


def test_a_backdated_message_is_detected_by_the_acknowledgement_in_it(desk: Desk) -> None:
    device = sender()
    messages = write_log(device)
    honest = quoting(msgspec.structs.replace(device), device, 11, 10.9)
    assert problems(desk.show((device, [*messages, honest]))) == []
    backdated = quoting(msgspec.structs.replace(device), device, 11 - MONTH_H, 10.9)
    [problem] = problems(desk.show((device, [*messages, backdated])))
    assert "is dated" in problem
    assert "before the acknowledgement" in problem


def test_a_log_that_differs_from_the_acknowledged_one_is_detected_without_a_head(desk: Desk) -> None:
    genuine, forger = sender(), sender()
    write_log(genuine)
    messages = write_log(forger, incident=False)
    messages.append(forger.results())
    [problem] = problems(desk.show((forger, [*messages, quoting(forger, genuine, 11, 10.9)])))
    assert "that pi-07 quotes is of another message 11" in problem


def test_a_head_from_after_the_folder_asks_for_a_newer_one(desk: Desk) -> None:
    device = sender()
    folder = desk.show((device, write_log(device)))
    assert problems(folder, head_of(device, hours=13)) == []
    device.results()
    [problem] = problems(folder, head_of(device, hours=13))
    assert "covers seq 12, but the log ends at seq 11 here" in problem
    assert "ask for a newer one" in problem


def test_an_operator_who_cuts_off_the_newest_messages_of_the_whole_fleet_is_detected(desk: Desk) -> None:
    """The folder then describes a moment before the head, as if it had been made earlier."""
    device = sender()
    messages = write_log(device)
    assert_only_the_head_tells(desk.show((device, messages[:-7]), until=4), head_of(device), "the operator cut off")


def test_a_head_at_a_gap_is_compared_with_the_message_behind_it(desk: Desk) -> None:
    device = sender()
    messages = write_log(device)
    copy = msgspec.structs.replace(device, seq=6, prev=log_chain.digest(messages[5].payload))
    folder = desk.show((device, [*messages[:5], *messages[6:]]))
    report = check(folder, head_of(copy), head_of(copy, digest="x" * 43))
    assert report.gaps == 1
    texts = [entry["problem"] for entry in report.problems if entry["file"].startswith("head")]
    assert len(texts) == 1
    assert "the log was rewritten" in texts[0]


def test_an_operator_who_takes_an_incident_out_of_a_log_is_detected_without_a_head(desk: Desk) -> None:
    device = sender()
    messages = write_log(device)
    folder = desk.show((device, [*messages[:4], *messages[5:]]))
    # Its own audit says so; a dishonest operator changes that.
    audit = folder / "audit.json"
    edited = msgspec.json.decode(audit.read_bytes())
    audit.write_bytes(msgspec.json.encode(edited | {"undeclared_gaps": 0, "passed": True}))
    resign(folder)
    assert problems(folder) == [
        f"chains/ messages 5 to 5 of log {LOG} of pi-07 are missing, and no device declared that"
    ]


def test_messages_that_a_device_declares_as_given_up_are_no_problem(desk: Desk) -> None:
    device = sender()
    messages = write_log(device)
    evidence = {"seq": [[2, 3]], "reason": "space"}
    messages.append(device.append("audit", event="evicted", summary="Given up.", evidence=evidence, time=at(11)))
    report = check(desk.show((device, [messages[0], *messages[3:]])), head_of(device))
    assert (report.problems, report.gaps) == ([], 1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "malformed"),
        (b"[" * 20_000, "too large"),
        (head_of(sender(), key=new_key(3)).replace(b"pi-07", b"pi-08"), "bad signature"),
        (head_of(sender(), fleet="other"), "is a head of fleet 'other'"),
        (head_of(sender(), key=new_key(3), seq=1), "which the folder does not list"),
    ],
)
def test_a_forged_or_foreign_head_is_named(desk: Desk, data: bytes, words: str) -> None:
    device = sender()
    [problem] = problems(desk.show((device, write_log(device))), data)
    assert words in problem


def test_a_message_signature_is_no_head(desk: Desk) -> None:
    message = sender().results()
    data = msgspec.json.encode({"payload": message.payload.decode(), "jws": message.jws})
    with pytest.raises(MessageRefused):
        log_head.verify(data)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_no_bytes_break_the_verification_of_a_head(junk: bytes, place: int) -> None:
    good = head_of(sender())
    for data in (junk, good[:place] + junk + good[place + len(junk) :]):
        try:
            log_head.verify(data)
        except MessageRefused:
            continue
        assert msgspec.json.decode(data)["payload"] == msgspec.json.decode(good)["payload"]


def test_heads_are_part_of_a_folder_that_was_made_with_them(desk: Desk) -> None:
    device = sender()
    messages = write_log(device)
    head = head_of(device)
    assert check(desk.show((device, messages), heads=[head])).witnesses == 1
    [problem] = problems(desk.show((device, messages[:-7]), heads=[head]))
    assert problem.startswith("witnesses/head-0001.json")


def test_a_chain_shows_no_content_of_a_message(desk: Desk) -> None:
    device = sender()
    folder = desk.show((device, write_log(device)))
    text = (folder / "chains" / "part-0001.jsonl").read_text(encoding="utf-8")
    assert "PEN" not in text
    assert json.loads(text)["kinds"] == [*["results"] * 4, "alerts", *["results"] * 5, "health"]
    assert len(text) < 11 * 70 + 200
