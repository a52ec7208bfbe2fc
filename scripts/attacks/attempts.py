"""Attempts of the transcript: what each party tries, in this order, and whether it may.

An attempt returns whether it succeeded, and what happened. Attempts against the history succeed if nobody notices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from outstation.foundation.errors import LinkDown
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.protocol.wire import jws, keys
from outstation.workbench.testing.messages import MessageSender
from outstation.workbench.testing.patience import wait_until
from scripts.attacks.parties import BASE, HONEST, HOSTILE, Parties
from scripts.kit.broker_client import NOT_AUTHORIZED, publish_all, publish_one, receive_messages, subscribe_anyway

COLLECTOR, OPERATOR, AUDITOR = "collector", "operator", "auditor"
# What each party holds, in the order of the transcript.
PARTIES = {
    HONEST: "honest, with its own keys",
    COLLECTOR: "with its key, certificate and database",
    OPERATOR: "with all keys of the fleet's folder, without the root keys",
    AUDITOR: "with the public root, and heads that devices signed",
    HOSTILE: "hostile, with its own valid certificate and key",
}
_FLOOD, _RETAINED = 1500, 40

Outcome = tuple[bool, str]


class Attempt(msgspec.Struct, frozen=True):
    party: str
    action: str
    may: bool
    act: Callable[[Parties], Outcome]


ATTEMPTS: list[Attempt] = []


def _attempt(party: str, action: str, *, may: bool = False) -> Callable[[Callable[[Parties], Outcome]], None]:
    return lambda act: ATTEMPTS.append(Attempt(party, action, may, act))


def _refused_by_broker(codes: list[int]) -> Outcome:
    refusals = sum(code == NOT_AUTHORIZED for code in codes)
    return refusals < len(codes), f"the broker refuses {refusals} of {len(codes)}: not authorized"


def _publish_empty(link: Link, *topics: str) -> list[int]:
    return [publish_one(link, OutgoingMessage(f"{BASE}/{topic}", b"{}")) for topic in topics]


def _count_acknowledged(parties: Parties) -> int:
    outbox = parties.device.status()["outbox"]
    return int(outbox["last"] - outbox["waiting"])


# The honest device and the collector


@_attempt(HONEST, "have its messages stored and acknowledged", may=True)
def _(parties: Parties) -> Outcome:
    wait_until("acknowledged", lambda: _count_acknowledged(parties) > 0)
    acknowledged = _count_acknowledged(parties)
    return True, f"{acknowledged} of {parties.count(HONEST)} stored messages are acknowledged"


@_attempt(COLLECTOR, "read every message of every device", may=True)
def _(parties: Parties) -> Outcome:
    with parties.link_of_collector() as link:
        refusals = subscribe_anyway(link, [f"{BASE}/#"])
        messages = receive_messages(link, 1)
    return not any(refusals) and bool(messages), f"the broker delivers {messages[0].topic if messages else 'nothing'}"


@_attempt(COLLECTOR, "command a device, or set its desired state")
def _(parties: Parties) -> Outcome:
    with parties.link_of_collector() as link:
        return _refused_by_broker(_publish_empty(link, f"{HONEST}/cmd", f"{HONEST}/desired", "_all/desired"))


@_attempt(COLLECTOR, "sign a message in a device's name")
def _(parties: Parties) -> Outcome:
    forged = MessageSender(HONEST, parties.collector_key).health().to_outgoing()
    with parties.link_of_collector() as link:
        return False, f"the collector refuses it, and counts it: {parties.await_refusal(HONEST, [forged], link)}"


@_attempt(COLLECTOR, "change who may publish and subscribe")
def _(parties: Parties) -> Outcome:
    with parties.link_of_collector() as link:
        code = publish_one(link, OutgoingMessage("$CONTROL/dynamic-security/v1", b'{"commands": []}'))
    return _refused_by_broker([code])


# The operator


@_attempt(OPERATOR, "command a device", may=True)
def _(parties: Parties) -> Outcome:
    answer = parties.run_json("command", HONEST, "report")
    return bool(answer["ok"]), f"{HONEST} replies: {answer['summary']}"


@_attempt(OPERATOR, "wipe a device at once, with one key")
def _(parties: Parties) -> Outcome:
    answer = parties.run_json("command", HONEST, "wipe", "--yes")
    wait_until("the alert", lambda: "wipe" in parties.open_alerts(HONEST))
    cancelled = parties.run_json("command", HONEST, "cancel-wipe")
    due = answer["data"].get("due", "at once")
    return not cancelled["ok"], f"due {due}, announced as a critical alert, and cancelled by another command"


@_attempt(OPERATOR, "lock other operators out by a huge counter")
def _(parties: Parties) -> Outcome:
    file = parties.home / "operator.counter"
    counter = file.read_text(encoding="ascii")
    file.write_text(f"{2**53 - 2}\n", encoding="ascii")
    parties.run("command", HONEST, "report", "--wait", "2", check=False)
    file.write_text(counter, encoding="ascii")
    answer = parties.run_json("command", HONEST, "report")
    return not answer["ok"], "a counter of the far future is refused; the next command is obeyed"


@_attempt(OPERATOR, "make another key an operator without the root keys")
def _(parties: Parties) -> Outcome:
    done = parties.run("keys", "add", "operator", keys.create().public.text, check=False)
    (parties.home / "repository" / "root.json.draft").unlink(missing_ok=True)
    return done.returncode == 0, (done.stdout + done.stderr).strip().splitlines()[0]


@_attempt(OPERATOR, "publish in a device's name, with a certificate that it issues itself")
def _(parties: Parties) -> Outcome:
    forged = MessageSender(HONEST, parties.operator_key).health().to_outgoing()
    with Link(parties.with_certificate_for(HONEST), HONEST) as link:
        return False, f"the broker takes it, the collector refuses it: {parties.await_refusal(HONEST, [forged], link)}"


def _compare_with_head(
    parties: Parties, name: str, enrolled: dict[str, keys.PublicKey], log: Sequence[IncomingMessage]
) -> Outcome:
    """Show the auditor a forged database; return what its folder says alone, and beside the device's head."""
    folder = parties.forge_database(name, enrolled.items(), log)
    with ThreadPoolExecutor() as pool:
        alone, compared = pool.map(lambda with_head: parties.verify(folder, with_head=with_head), (False, True))
    problems = [entry["problem"] for entry in compared["problems"]]
    alone_text = "the folder alone verifies" if alone["ok"] else "the folder alone fails, too"
    return compared["ok"], f"{alone_text}; beside the device's head: {problems[0] if problems else 'no problem'}"


@_attempt(OPERATOR, "cut off a device's newest messages unnoticed")
def _(parties: Parties) -> Outcome:
    parties.take_head()
    log = parties.read_log(HONEST)
    return _compare_with_head(parties, "cut", {HONEST: parties.public_key(HONEST)}, log[: len(log) // 2])


@_attempt(OPERATOR, "delete a device unnoticed")
def _(parties: Parties) -> Outcome:
    other = MessageSender("pi-09")
    return _compare_with_head(parties, "deleted", {"pi-09": other.key.public}, [other.health().to_incoming()])


@_attempt(OPERATOR, "rewrite a device's log with a key that it enrols itself")
def _(parties: Parties) -> Outcome:
    forger = MessageSender(HONEST)
    log = [forger.results(time="2026-10-01T00:00:00Z").to_incoming() for _ in range(20)]
    return _compare_with_head(parties, "rewritten", {HONEST: forger.key.public}, log)


@_attempt(OPERATOR, "change a table of the database unnoticed")
def _(parties: Parties) -> Outcome:
    [row] = parties.fleet.query("SELECT log, seq, row, score FROM results WHERE device = ? LIMIT 1", HONEST)
    with contextlib.closing(parties.fleet.open_store(write=True)) as store:
        for score in (0.125, row[3]):
            with store.transaction() as db:
                db.execute("UPDATE results SET score = ? WHERE log = ? AND seq = ? AND row = ?", (score, *row[:3]))
            if score != row[3]:
                audit = parties.run_json("audit", "--device", HONEST)
    return bool(audit["passed"]), "the audit derives the table again from signed messages, and fails"


# The auditor


@_attempt(AUDITOR, "verify genuine evidence, with the operator's key that the root names", may=True)
def _(parties: Parties) -> Outcome:
    parties.take_head()
    report = parties.verify(parties.make_evidence("genuine"), with_head=True)
    text = f"{report['files']} files and {report['chained_messages']} messages verify, and agree with the device's head"
    return bool(report["ok"]), text if report["ok"] else str(report["problems"][:2])


@_attempt(AUDITOR, "connect to the broker")
def _(parties: Parties) -> Outcome:
    broker = msgspec.structs.replace(parties.fleet.config.broker, cert_file=None, tls_key_file=None)
    try:
        Link(broker, AUDITOR, timeout_s=3.0).close()
    except LinkDown as down:
        return False, f"refused without a certificate of the fleet: {down}"
    return True, "connected"


@_attempt(AUDITOR, "find a device's readings in the evidence")
def _(parties: Parties) -> Outcome:
    readings = parties.read_readings()
    evidence = b"".join(path.read_bytes() for path in parties.folder.glob("evidence-genuine/**/*") if path.is_file())
    leaked = [reading for reading in readings if reading.encode() in evidence]
    return bool(
        leaked
    ), f"{len(leaked)} of {len(readings)} readings that the device discloses are in {len(evidence):,} bytes"


# The hostile device


@_attempt(HOSTILE, "publish in its own name, whatever it likes", may=True)
def _(parties: Parties) -> Outcome:
    with parties.link_of_thief() as link:
        publish_all(link, [parties.sender.results().to_outgoing() for _ in range(5)])
    wait_until("stored", lambda: parties.count(HOSTILE) == 5)
    return True, "5 invented results are stored, as its own"


@_attempt(HOSTILE, f"publish in the name of {HONEST}, or command it")
def _(parties: Parties) -> Outcome:
    with parties.link_of_thief() as link:
        topics = [f"{HONEST}/{kind}" for kind in ("health", "results/exercise", "state", "keys", "cmd", "ack")]
        return _refused_by_broker(_publish_empty(link, *topics))


@_attempt(HOSTILE, f"sign a message of {HONEST} with its own key")
def _(parties: Parties) -> Outcome:
    forged = MessageSender(HONEST, parties.sender.key).health()
    sent = OutgoingMessage(f"{BASE}/{HOSTILE}/health", forged.payload, (("jws", forged.jws),))
    with parties.link_of_thief() as link:
        return False, f"the collector refuses it: {parties.await_refusal(HOSTILE, [sent], link)}"


@_attempt(HOSTILE, "read messages of others, or join the collectors' group to take them")
def _(parties: Parties) -> Outcome:
    filters = ["#", f"{BASE}/#", f"{BASE}/{HONEST}/results/+", f"{BASE}/{HONEST}/cmd", f"$share/collect/{BASE}/#"]
    with parties.link_of_thief() as link:
        refusals = subscribe_anyway(link, filters)
    return not all(refusals), f"the broker refuses {sum(map(bool, refusals))} of {len(filters)} subscriptions"


@_attempt(HOSTILE, "change who may publish and subscribe")
def _(parties: Parties) -> Outcome:
    with parties.link_of_thief() as link:
        code = publish_one(link, OutgoingMessage("$CONTROL/dynamic-security/v1", b'{"commands": []}'))
    return _refused_by_broker([code])


@_attempt(HOSTILE, "fill the broker with retained topics while a collector runs")
def _(parties: Parties) -> Outcome:
    topics = [f"{BASE}/{HOSTILE}/results/{number}" for number in range(_RETAINED)]
    with parties.link_of_thief() as link:
        flood = [OutgoingMessage(topic, b"x" * 1000, retain=True) for topic in topics]
        parties.await_refusal(HOSTILE, flood, link, n=_RETAINED)

    def count_retained() -> int:
        with parties.link_of_operator(subscribe=[f"{BASE}/{HOSTILE}/results/+"]) as link:
            return len(receive_messages(link, 1, 0.3))

    wait_until("the collector deletes them", lambda: not count_retained())
    return False, f"the collector deletes all {_RETAINED}"


@_attempt(HOSTILE, "end a reader by a time that no calendar has")
def _(parties: Parties) -> Outcome:
    message = parties.sender.health()
    bad = message.payload.replace(b"2026-11-24T22:18:01.000000Z", b"2026-02-30T25:61:61.000000Z")
    signed = OutgoingMessage(message.topic, bad, (("jws", jws.sign(parties.sender.key, message.topic, bad)),))
    with parties.link_of_thief() as link:
        return False, f"the collector refuses it on receipt: {parties.await_refusal(HOSTILE, [signed], link)}"


@_attempt(HOSTILE, "give two messages one number unnoticed")
def _(parties: Parties) -> Outcome:
    fork = msgspec.structs.replace(parties.sender)
    with parties.link_of_thief() as link:
        publish_all(link, [parties.sender.results().to_outgoing(), fork.results(n=2).to_outgoing()])
    wait_until("the alert", lambda: any("/" in subject for subject in parties.open_alerts(HOSTILE)))
    return False, "the collector keeps the first one, and raises a critical alert"


@_attempt(HOSTILE, f"crowd out {HONEST} by a flood")
def _(parties: Parties) -> Outcome:
    started = parties.count(HONEST)
    with parties.link_of_thief() as link:
        flood = [parties.sender.results().to_outgoing() for _ in range(_FLOOD)]
        parties.await_refusal(HOSTILE, flood, link, n=_FLOOD // 2)
    wait_until("the alert", lambda: "quota" in parties.open_alerts(HOSTILE))
    wait_until(f"messages of {HONEST}", lambda: parties.count(HONEST) > started + 2)
    refused = parties.refusals(HOSTILE)["over quota"]
    return False, f"{refused} of {_FLOOD} are over its quota, and an alert is raised; {HONEST} goes on"


@_attempt(HOSTILE, "go on after `fleet devices revoke`")
def _(parties: Parties) -> Outcome:
    with parties.link_of_thief() as link:
        ended = parties.run_json("revoke", HOSTILE)["session_ended"]
        try:
            publish_one(link, OutgoingMessage(f"{BASE}/{HOSTILE}/health", b"{}"))
        except LinkDown:
            pass
        else:
            return True, "its session went on"
    try:
        with parties.link_of_thief():
            return True, "its certificate connects again"
    except LinkDown as down:
        return not ended, f"its session ends at once, and its certificate is refused: {down}"


@_attempt(HONEST, "lose nothing by all of this", may=True)
def _(parties: Parties) -> Outcome:
    parties.take_head()
    audit = parties.run_json("audit", "--device", HONEST)
    return bool(audit["passed"]), f"the audit of its {parties.count(HONEST)} messages passes: none is missing"
