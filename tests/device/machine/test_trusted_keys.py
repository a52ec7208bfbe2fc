"""Attacks with stolen operator keys, and the trust document by which the root keys take them out of use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root

from outstation.device.commands.executor import Action, CommandExecutor
from outstation.device.commands.receiver import CommandReceiver
from outstation.device.machine.trusted_keys import MAX_AHEAD_S, MAX_AHEAD_UNSYNCED_S, TrustedKeys, load_operators
from outstation.device.pipeline.tasks import Effect
from outstation.device.recovery.open import open_store
from outstation.device.rollout.desired_state import DesiredStateStore
from outstation.device.store import store as stores
from outstation.device.store.command_log import CommandAnswer
from outstation.device.store.message_log import MessageLog
from outstation.device.uplink.uplink import Receiver
from outstation.fleet.repository import trust as repository_trust
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import MessageRefused, StorageFull
from outstation.protocol.transport.packets import IncomingMessage
from outstation.protocol.wire import jws, root_metadata, trust
from outstation.protocol.wire.jws import Signer, encode
from outstation.protocol.wire.keys import SigningKey
from outstation.protocol.wire.trust import TrustedKey
from outstation.workbench.testing.messages import new_key
from tests.kit.operators import DEVICE, FLEET, NOW, Operator

pytestmark = pytest.mark.attack("operators")

HIGHEST = 2**53 - 1
NOW_MS = NOW.wall_us // 1000
TRUST_TOPIC = f"outstation/{FLEET}/_all/trust"
OWN_DESIRED = f"outstation/{FLEET}/{DEVICE}/desired"
ROOT_KEYS = [new_key(number) for number in (201, 202, 203)]
STOLEN, SECOND, THIEF = new_key(77), new_key(78), new_key(79)
COLLECTOR, NEW_COLLECTOR = new_key(9), new_key(10)


def tuf_signer(key: SigningKey) -> CryptoSigner:
    return CryptoSigner(key.private)


def make_root(
    version: int,
    listed: list[TrustedKey] | None,
    *signers: SigningKey,
    threshold: int = 2,
    root_keys: list[SigningKey] = ROOT_KEYS,
) -> str:
    """Return a root of python-tuf, signed by `signers`."""
    root = Metadata(Root(version=version, consistent_snapshot=True))
    for key in root_keys:
        root.signed.add_key(tuf_signer(key).public_key, "root")
    root.signed.roles["root"].threshold = threshold
    if listed is not None:
        root.signed.unrecognized_fields["outstation"] = {"keys": msgspec.to_builtins(listed)}
    for signer in signers or root_keys[:threshold]:
        root.sign(tuf_signer(signer), append=True)
    return root.to_bytes().decode()


def listed(*operators: SigningKey, collector: SigningKey = COLLECTOR, **roles: SigningKey) -> list[TrustedKey]:
    keys = [TrustedKey(key.public.text, "operator") for key in operators]
    keys += [TrustedKey(key.public.text, role) for role, key in roles.items()]
    return [*keys, TrustedKey(collector.public.text, "collector")]


def trust_message(*roots: str) -> IncomingMessage:
    return IncomingMessage(TRUST_TOPIC, trust.encode_message(roots), (), True, 1, 1)


def desired(key: SigningKey, counter: int) -> IncomingMessage:
    head = {"v": 1, "kind": "desired", "device": DEVICE, "counter": counter}
    payload = encode({**head, "issued": "2026-11-26T00:00:00Z", "tasks": {"sort": WANTED}})
    return IncomingMessage(OWN_DESIRED, payload, (jws.sign(key, OWN_DESIRED, payload),), True, 1, 1)


WANTED = {"rollout": "r1", "bundle": "sort", "version": "2", "digest": f"sha256:{'0' * 64}", "strategy": "all"}


@dataclass
class Device:
    """A device in this process, whose store can be closed and opened again as after a crash."""

    folder: Path
    now: ClockReading = NOW
    ran: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "root.json").write_text(make_root(1, None))
        self.open()

    def open(self) -> None:
        self.store = open_store(self.folder / "data")
        self.log = MessageLog(FLEET, DEVICE, new_key(1), self.store.log_id, self.store.boot, 120_000)
        configured = [Signer("operator", STOLEN.public), Signer("collector", COLLECTOR.public)]
        self.metadata = self.folder / "data" / "updates"
        self.trusted = TrustedKeys(
            self.store, self.log, lambda: self.now, configured, self.folder / "root.json", self.metadata
        )
        self.commands = CommandReceiver(self.store, self.log, self.trusted)
        self.desires = DesiredStateStore(self.store, self.log, self.trusted, [])
        self.trusted.on_change = self.desires.verify_again
        actions = {name: self._action(name) for name in ("report", "rollback", "pause")}
        self.executor = CommandExecutor(self.store, self.log, self.commands, actions, {})

    def _action(self, name: str) -> Action:
        def act(_args: Mapping[str, str], _now: ClockReading) -> Effect:
            self.ran.append(name)
            return Effect(f"{name} done")

        return act

    def crash(self) -> None:
        self.store.close()
        self.open()

    def take_trust(self, *roots: str) -> None:
        self.trusted.accept(trust_message(*roots))
        self.trusted.tick(None, self.now)

    def obey(self, delivery: IncomingMessage) -> CommandAnswer:
        self.commands.accept(delivery)
        self.executor.tick(self.now)
        with self.store.transaction() as tx:
            return tx.commands.unsent(0)[-1]

    def refusal(self, delivery: IncomingMessage) -> str:
        receivers: list[Receiver] = [self.trusted, self.commands, self.desires]
        try:
            next(receiver for receiver in receivers if receiver.owns(delivery.topic)).accept(delivery)
        except MessageRefused as refused:
            return refused.reason
        return ""


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path)
    yield made
    made.store.close()


def operator(key: SigningKey) -> Operator:
    first = NOW_MS

    def counters() -> Iterator[int]:
        while True:
            nonlocal first
            first += 1
            yield first

    return Operator(key, counters=counters())


# --- counters ---


@pytest.mark.parametrize("quality", ["synced", "restored", "unsynced"])
def test_a_stolen_signature_with_the_highest_counter_does_not_lock_the_operator_out(
    device: Device, quality: str
) -> None:
    device.now = msgspec.structs.replace(NOW, quality=quality)
    owner = operator(STOLEN)
    assert device.refusal(owner.command("report", counter=HIGHEST)) == "counter in the future"
    assert device.obey(owner.command("report")).ok
    device.crash()
    assert device.obey(owner.command("report")).ok


@pytest.mark.attack("operators", control=True)
def test_where_any_counter_is_plausible_one_stolen_signature_locks_the_operator_out(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrustedKeys, "_highest_counter", lambda _: HIGHEST)
    owner = operator(STOLEN)
    assert device.obey(owner.command("report", counter=HIGHEST)).ok
    device.crash()
    assert device.refusal(owner.command("report")) == "replayed"


def test_a_stolen_signature_does_not_lock_the_desired_state_either(device: Device) -> None:
    assert device.refusal(desired(STOLEN, HIGHEST)) == "counter in the future"
    assert device.refusal(desired(STOLEN, NOW_MS)) == ""
    device.desires.apply_pending(NOW)
    assert device.desires.find_desired("sort") is not None


def test_a_counter_is_plausible_up_to_a_day_ahead_and_longer_without_a_time_service(device: Device) -> None:
    owner = operator(STOLEN)
    assert device.refusal(owner.command(counter=NOW_MS + MAX_AHEAD_S * 1000 + 1)) == "counter in the future"
    assert device.refusal(owner.command(counter=NOW_MS + MAX_AHEAD_S * 1000)) == ""
    # The device was off for a year and does not know the time.
    device.now = msgspec.structs.replace(NOW, quality="restored")
    assert device.refusal(owner.command(counter=NOW_MS + 365 * 86_400_000)) == ""
    assert device.refusal(owner.command(counter=NOW_MS + MAX_AHEAD_UNSYNCED_S * 1000 + 1)) == "counter in the future"


def lock_out(device: Device) -> None:
    """Store the counter that a device accepted while its counters had no bound."""
    with device.store.transaction() as tx:
        tx.commands.replace_counter(STOLEN.public.kid, HIGHEST)
    device.crash()


def test_a_stored_absurd_counter_is_recovered_by_the_roots_word_across_restarts(device: Device) -> None:
    lock_out(device)
    owner = operator(STOLEN)
    captured = owner.command("pause", counter=NOW_MS - 1)
    assert device.refusal(owner.command("report")) == "replayed"
    keys = [msgspec.structs.replace(listed(STOLEN)[0], counter=NOW_MS), *listed(STOLEN)[1:]]
    device.take_trust(make_root(1, None), make_root(2, keys))
    device.crash()
    assert device.refusal(captured) == "replayed"
    assert device.obey(owner.command("report")).ok
    device.crash()
    assert device.obey(owner.command("report")).ok


def test_the_roots_word_about_a_counter_replays_no_command_that_was_used_since(device: Device) -> None:
    keys = [msgspec.structs.replace(listed(STOLEN)[0], counter=NOW_MS), *listed(STOLEN)[1:]]
    device.take_trust(make_root(2, keys))
    used = operator(STOLEN).command("report")
    assert device.obey(used).ok
    device.crash()
    assert device.refusal(used) == "replayed"


# --- keys ---


def test_a_stolen_key_is_revoked_on_the_running_daemon_and_stays_so(device: Device) -> None:
    thief, owner = operator(STOLEN), operator(SECOND)
    assert device.obey(thief.command("pause", args={"task": "sort"})).ok
    device.take_trust(make_root(2, listed(SECOND)))
    assert device.refusal(thief.command("pause", args={"task": "sort"})) == "unknown key"
    assert device.obey(owner.command("report")).ok
    device.crash()
    assert device.refusal(thief.command("pause", args={"task": "sort"})) == "unknown key"
    assert device.obey(owner.command("report")).ok


def test_a_desired_state_of_a_revoked_key_ends_at_once(device: Device) -> None:
    assert device.refusal(desired(STOLEN, NOW_MS)) == ""
    device.desires.apply_pending(NOW)
    device.take_trust(make_root(2, listed(SECOND)))
    assert device.desires.find_desired("sort") is None
    device.crash()
    assert device.desires.find_desired("sort") is None


def test_a_command_that_waits_while_its_key_is_revoked_is_not_executed(device: Device) -> None:
    device.commands.accept(operator(STOLEN).command("pause", args={"task": "sort"}))
    device.take_trust(make_root(2, listed(SECOND)))
    device.executor.tick(NOW)
    assert device.ran == []
    with device.store.transaction() as tx:
        assert "was revoked" in tx.commands.unsent(0)[-1].summary


def test_a_copied_root_does_not_bring_a_revoked_key_back(device: Device) -> None:
    old, new = make_root(2, listed(STOLEN)), make_root(3, listed(SECOND))
    device.take_trust(old, new)
    assert device.refusal(trust_message(old)) == "older root"
    device.crash()
    assert device.refusal(trust_message(make_root(1, None), old)) == "older root"
    assert device.refusal(operator(STOLEN).command()) == "unknown key"
    device.take_trust(old, new)


@pytest.mark.parametrize(
    ("signers", "reason"),
    [
        ([ROOT_KEYS[0]], "too few signatures"),
        ([ROOT_KEYS[0], ROOT_KEYS[0]], "too few signatures"),
        ([ROOT_KEYS[0], THIEF], "too few signatures"),
        ([STOLEN], "too few signatures"),
    ],
)
def test_one_root_key_or_an_operators_key_changes_no_key(
    device: Device, signers: list[SigningKey], reason: str
) -> None:
    assert device.refusal(trust_message(make_root(2, listed(THIEF), *signers))) == reason
    assert device.refusal(operator(THIEF).command()) == "unknown key"


def test_one_root_key_listed_under_two_ids_counts_once(device: Device) -> None:
    root = Metadata[Root].from_bytes(make_root(2, listed(THIEF)).encode())
    signed = msgspec.to_builtins(root.signed.to_dict())
    [first, second, _] = signed["roles"]["root"]["keyids"]
    signed["keys"][second] = signed["keys"][first]
    signature = ROOT_KEYS[0].sign((encode_canonical(signed) or "").encode()).hex()
    both = [{"keyid": keyid, "sig": signature} for keyid in (first, second)]
    text = msgspec.json.encode({"signed": signed, "signatures": both}).decode()
    assert device.refusal(trust_message(text)) == "too few signatures"


def test_a_root_with_new_root_keys_needs_the_signatures_of_the_old_ones(device: Device) -> None:
    theirs = [THIEF, new_key(205)]
    assert device.refusal(trust_message(make_root(2, listed(THIEF), *theirs, root_keys=theirs))) == "too few signatures"
    device.take_trust(make_root(2, listed(SECOND), *theirs, *ROOT_KEYS[:2], root_keys=theirs))
    assert device.refusal(trust_message(make_root(3, listed(STOLEN)))) == "too few signatures"


def test_a_root_that_skips_one_is_refused(device: Device) -> None:
    assert device.refusal(trust_message(make_root(HIGHEST, listed(THIEF)))) == "missing root"
    device.take_trust(make_root(2, listed(SECOND)))


def test_a_document_that_would_lock_the_fleet_out_is_refused(device: Device) -> None:
    assert device.refusal(trust_message(make_root(2, listed(collector=COLLECTOR)))) == "malformed trust"
    assert device.obey(operator(STOLEN).command()).ok


def test_acknowledgements_of_a_revoked_collector_count_no_more(device: Device) -> None:
    assert device.trusted.find_collector(COLLECTOR.public.kid) is not None
    device.take_trust(make_root(2, listed(STOLEN, collector=NEW_COLLECTOR)))
    assert device.trusted.find_collector(COLLECTOR.public.kid) is None
    assert device.trusted.find_collector(NEW_COLLECTOR.public.kid) is not None
    assert device.trusted.find_commander(NEW_COLLECTOR.public.kid) is None


def make_history(device: Device) -> Path:
    """Make the folder in which the fetch worker stores roots, with the first one."""
    first = (device.folder / "root.json").read_bytes()
    history = device.metadata / hashlib.sha256(first).hexdigest()[:16] / "root_history"
    history.mkdir(parents=True)
    (history / "1.root.json").write_bytes(first)
    return history


def test_roots_that_the_fetch_worker_stored_are_verified_and_used(device: Device) -> None:
    history = make_history(device)
    (history / "2.root.json").write_text(make_root(2, listed(SECOND)))
    (history / "3.root.json").write_text(make_root(3, listed(THIEF), THIEF))
    device.trusted.tick(None, NOW)
    assert device.obey(operator(SECOND).command("report")).ok
    assert device.refusal(operator(THIEF).command()) == "unknown key"


def test_a_stored_root_under_the_name_of_its_successor_changes_nothing(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    (make_history(device) / "2.root.json").write_bytes((device.folder / "root.json").read_bytes())
    device.trusted.tick(None, NOW)
    assert "2.root.json: its trust document cannot be used" in caplog.text
    assert device.obey(operator(STOLEN).command("report")).ok


def test_operators_of_an_abandoned_repository_publish_and_command_no_more(device: Device) -> None:
    anchor = device.folder / "root.json"
    device.take_trust(make_root(2, listed(SECOND)))
    assert [key.kid for key in load_operators(device.store, anchor)] == [SECOND.public.kid]
    theirs = [new_key(206), new_key(207)]
    first = anchor.read_text()
    anchor.write_text(make_root(1, None, root_keys=theirs))
    assert load_operators(device.store, anchor) == []
    device.crash()
    assert device.refusal(operator(SECOND).command()) == "unknown key"
    # The stored root was deleted: the former first root does not bring it back.
    anchor.write_text(first)
    assert load_operators(device.store, anchor) == []


def test_a_damaged_first_root_deletes_no_stored_root(device: Device) -> None:
    anchor = device.folder / "root.json"
    device.take_trust(make_root(2, listed(SECOND)))
    first = anchor.read_text()
    anchor.write_text(first[:100])
    device.crash()
    anchor.write_text(first)
    device.crash()
    assert device.refusal(operator(STOLEN).command()) == "unknown key"
    assert [key.kid for key in load_operators(device.store, anchor)] == [SECOND.public.kid]


def test_the_change_is_in_the_log(device: Device) -> None:
    device.take_trust(make_root(2, listed(SECOND)))
    bodies = [msgspec.json.decode(message.payload) for message in device.store.unacknowledged_messages(0, 1000)]
    [evidence] = [body["evidence"] for body in bodies if body.get("event") == "trust changed"]
    assert evidence["version"] == 2
    assert {"kid": SECOND.public.kid, "role": "operator"} in evidence["keys"]


def test_killed_before_the_commit_the_old_keys_count_and_afterwards_the_new_ones(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_root(2, listed(SECOND))
    device.trusted.accept(trust_message(root))
    # Killed after the message was verified, before it was stored.
    device.crash()
    assert device.refusal(operator(STOLEN).command()) == ""
    device.trusted.accept(trust_message(root))
    with monkeypatch.context() as patched:

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(device.trusted, "_use", die)
        with pytest.raises(KeyboardInterrupt):
            device.trusted.tick(None, NOW)
    # Killed after the commit, before the keys were used.
    device.crash()
    assert device.refusal(operator(STOLEN).command()) == "unknown key"


def test_on_a_full_disk_the_document_waits_and_then_counts(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageFull("no room")

    with monkeypatch.context() as patched:
        patched.setattr(stores.Store, "transaction", full)
        device.take_trust(make_root(2, listed(SECOND)))
    assert device.refusal(operator(STOLEN).command()) == ""
    device.trusted.tick(None, msgspec.structs.replace(NOW, boot_s=NOW.boot_s + 10))
    assert device.refusal(operator(STOLEN).command()) == "unknown key"


def test_a_missing_first_root_brings_no_revoked_key_back(device: Device) -> None:
    device.take_trust(make_root(2, listed(SECOND)))
    (device.folder / "root.json").unlink()
    device.crash()
    assert device.refusal(operator(STOLEN).command()) == "unknown key"
    device.take_trust(make_root(3, listed(THIEF)))
    device.crash()
    assert device.refusal(operator(SECOND).command()) == "unknown key"


# --- roles ---


@pytest.mark.parametrize(
    ("role", "allowed"),
    [("reporter", {"report"}), ("deployer", {"report", "rollback"}), ("operator", {"report", "rollback", "pause"})],
)
def test_a_key_commands_only_what_its_role_may(device: Device, role: str, allowed: set[str]) -> None:
    device.take_trust(make_root(2, [*listed(SECOND), TrustedKey(THIEF.public.text, role)]))
    owner = operator(THIEF)
    for name in ("report", "rollback", "pause"):
        args = {} if name == "report" else {"task": "sort"}
        assert device.obey(owner.command(name, args=args)).ok == (name in allowed)
    assert set(device.ran) == allowed
    assert device.refusal(desired(THIEF, NOW_MS)) == ("other role" if role == "reporter" else "")


def test_an_unknown_role_gives_no_rights(device: Device) -> None:
    device.take_trust(make_root(2, [*listed(SECOND), TrustedKey(THIEF.public.text, "admin")]))
    assert device.refusal(operator(THIEF).command()) == "unknown key"


# --- bytes ---


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b'{"v":1,"kind":"trust","roots":[]}',
        b'{"v":1,"kind":"trust","roots":["{}"]}',
        b'{"v":1,"kind":"trust","roots":["{\\"signed\\":{},\\"signatures\\":[]}"]}',
        b'{"v":1,"kind":"trust","roots":["' + b"[" * 10_000 + b'"]}',
        b" " * (trust.MAX_TRUST_BYTES + 1),
    ],
)
def test_hostile_bytes_are_refused(device: Device, payload: bytes) -> None:
    assert device.refusal(IncomingMessage(TRUST_TOPIC, payload, (), True, 1, 1))


@pytest.mark.parametrize("value", [{}, {"b": [1, True, None, 'ä"\\\n'], "a": -5, "ü": {"z": [], "y": "x"}}])
def test_canonical_json_is_that_of_python_tuf(value: dict[str, object]) -> None:
    assert root_metadata._canonical(value) == encode_canonical(value)


def test_a_message_has_the_newest_roots_that_fit() -> None:
    roots = [make_root(version, listed(SECOND)) for version in range(1, 150)]
    message = trust.decode_message(trust.encode_message(roots))
    assert message.roots == roots[-len(message.roots) :]
    assert 10 < len(message.roots) <= trust.MAX_ROOTS


def test_an_edit_keeps_the_fleet_able_to_command() -> None:
    root = Root(version=1)
    first = listed(STOLEN)
    repository_trust.apply_edit(root, repository_trust.add_key("operator", SECOND.public.text), first)
    repository_trust.apply_edit(root, repository_trust.revoke_key(STOLEN.public.kid), first)
    assert [key.key for key in repository_trust.read_keys(root) or []] == [COLLECTOR.public.text, SECOND.public.text]
