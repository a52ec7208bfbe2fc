"""RFC 3161 time stamps against an operator who has every key of the fleet, with OpenSSL's authority."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.evidence.format.contents import ReadLimits
from outstation.evidence.timestamps import log_heads, token
from outstation.evidence.timestamps.stamp import Stamp
from outstation.evidence.verify.stamps import Witnesses
from outstation.evidence.verify.verify import verify
from outstation.fleet.database.evidence import EvidenceQueries
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.foundation import clock
from outstation.foundation.errors import MessageRefused, UsageError
from outstation.workbench.testing.messages import FLEET, MessageSender, SignedMessage
from tests.evidence.test_witness import Desk, sender, write_log
from tests.kit.commands import call_outstation
from tests.kit.evidences import T0_US, alert, at
from tests.kit.fleet_databases import DATABASES, fresh_in
from tests.kit.received_evidence import OPERATOR
from tests.kit.timestamp_authorities import POLICY, Authority, send

pytestmark = pytest.mark.attack("history")

# The authority dates by this machine's clock: hours from the tests' first moment to now.
NOW_H = (time.time() * 1e6 - T0_US) / 3.6e9
LOG_HOURS = 11
SINCE_H = NOW_H - LOG_HOURS - 1


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority") / "good")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def stamped(authority: Authority, *devices: MessageSender, fleet: str = FLEET) -> Stamp:
    """Return a stamp of these devices' newest messages."""
    heads = log_heads.LogHeads(fleet=fleet, heads=[log_heads.LogEnd(d.device, d.log, d.seq, d.prev) for d in devices])
    data = msgspec.json.encode(heads)
    request = token.create_request(data)
    return Stamp("month.tsr", data, request, authority.reply(request))


def problems(
    folder: Path, authority: Authority, *stamps: Stamp, policy: str = "", max_delay_s: float = 7 * 86400
) -> list[str]:
    brought = Witnesses((), stamps, token.load_trust(authority.root, policy), max_delay_s)
    report = verify(folder, [OPERATOR["key"].public], brought)
    return [f"{entry['file']} {entry['problem']}" for entry in report.problems]


def assert_only_the_stamp_tells(folder: Path, authority: Authority, stamp: Stamp, words: str) -> None:
    """Assert that the folder alone has no problem, and that the stamp shows exactly this one."""
    assert problems(folder, authority) == []
    [problem] = problems(folder, authority, stamp)
    assert problem.startswith("month.tsr ")
    assert words in problem


def show(desk: Desk, *logs: tuple[MessageSender, list[SignedMessage]]) -> Path:
    return desk.show(*logs, until=NOW_H)


def test_an_honest_operators_folder_agrees_with_its_time_stamps(desk: Desk, authority: Authority) -> None:
    device = sender()
    messages = write_log(device, since=SINCE_H)
    first = stamped(authority, device)
    messages.append(device.results(time=at(NOW_H)))
    second = stamped(authority, device)
    brought = Witnesses((), [first], token.load_trust(authority.root, POLICY))
    folder = desk.show((device, messages), until=NOW_H, stamps=[second])
    report = verify(folder, [OPERATOR["key"].public], brought)
    assert (report.problems, report.stamps, report.unchecked_stamps) == ([], 2, 0)
    assert abs(clock.parse_rfc3339(report.stamped_at) - time.time() * 1e6) < 60e6
    # Without an authority to trust they are counted, and the folder verifies by the rest.
    report = verify(folder, [OPERATOR["key"].public])
    assert (report.problems, report.stamps, report.unchecked_stamps) == ([], 0, 1)


def test_an_operator_who_cuts_off_messages_after_a_time_stamp_is_detected(desk: Desk, authority: Authority) -> None:
    device = sender()
    messages = write_log(device, since=SINCE_H)
    folder = show(desk, (device, messages[:-7]))
    assert_only_the_stamp_tells(folder, authority, stamped(authority, device), "covers seq 11, but the log ends at seq")


def test_an_operator_who_deletes_a_device_after_a_time_stamp_is_detected(desk: Desk, authority: Authority) -> None:
    device, other = sender(), sender("pi-08", 8, "5f0c2f6e-1a54-4d0b-9a53-000000000009")
    write_log(device, since=SINCE_H)
    messages = write_log(other, since=SINCE_H)
    stamp = stamped(authority, device, other)
    folder = show(desk, (other, messages))
    assert_only_the_stamp_tells(folder, authority, stamp, "covers device 'pi-07', of which the folder lists no key")


def test_an_operator_who_rewrites_a_stamped_log_a_month_back_is_detected(desk: Desk, authority: Authority) -> None:
    device, forger = sender(), sender()
    write_log(device, since=SINCE_H)
    forged = [*write_log(forger, since=SINCE_H - 720, incident=False), forger.results(time=at(NOW_H))]
    folder = show(desk, (forger, forged))
    assert_only_the_stamp_tells(folder, authority, stamped(authority, device), "the log was rewritten")


def test_a_log_invented_after_a_time_stamp_and_dated_before_it_is_detected(desk: Desk, authority: Authority) -> None:
    device, invented = sender(), sender("pi-08", 8, "5f0c2f6e-1a54-4d0b-9a53-000000000009")
    messages = write_log(device, since=SINCE_H)
    stamp = stamped(authority, device)
    folder = show(desk, (device, messages), (invented, write_log(invented, since=SINCE_H - 720)))
    backdated = problems(folder, authority, stamp)
    assert backdated
    assert all("does not cover it: it was backdated, or came more than 7 days late" in problem for problem in backdated)
    # The auditor knows that this device was offline.
    assert problems(folder, authority, stamp, max_delay_s=60 * 86400) == []


def test_a_message_dated_after_the_time_stamp_that_covers_it_is_detected(desk: Desk, authority: Authority) -> None:
    device = sender()
    messages = [alert(device, "ax/fault/1", "raised", NOW_H + 48, "ax: repeats one value.")]
    messages += write_log(device, since=SINCE_H, incident=False)
    [problem] = problems(show(desk, (device, messages)), authority, stamped(authority, device))
    assert problem.startswith("messages/part-0001.jsonl:1 is dated")
    assert problem.endswith("covers it already")


def test_a_token_of_an_authority_that_nobody_trusts_is_refused(
    desk: Desk, authority: Authority, tmp_path: Path
) -> None:
    device = sender()
    messages = write_log(device, since=SINCE_H)
    stamp = stamped(Authority(tmp_path / "other"), device)
    assert_only_the_stamp_tells(show(desk, (device, messages)), authority, stamp, "not lead to a trusted certificate")


def test_a_token_of_an_expired_certificate_is_refused(desk: Desk, tmp_path: Path) -> None:
    device = sender()
    folder = show(desk, (device, write_log(device, since=SINCE_H)))
    ended = Authority(tmp_path / "ended", ended=True)
    assert_only_the_stamp_tells(folder, ended, stamped(ended, device), "not lead to a trusted certificate")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"heads": s.heads.replace(b'"seq":11', b'"seq":10')}, "another document"),
        (lambda s: {"request": token.create_request(s.heads)}, "another nonce"),
        (lambda s: {"request": b""}, "has no nonce"),
        (lambda s: {"response": s.response[:-1]}, "malformed time stamp"),
        (lambda s: {"response": b"x" * (65 << 10)}, "too large"),
        (lambda s: {"response": bytes.fromhex("30053003020102")}, "the authority refused: rejection"),
    ],
)
def test_a_stamp_of_foreign_or_damaged_files_is_refused(
    desk: Desk, authority: Authority, change: Callable[[Stamp], dict[str, bytes]], words: str
) -> None:
    device = sender()
    folder = show(desk, (device, write_log(device, since=SINCE_H)))
    stamp = stamped(authority, device)
    assert_only_the_stamp_tells(folder, authority, msgspec.structs.replace(stamp, **change(stamp)), words)


def test_a_stamp_under_another_policy_or_of_another_fleet_is_refused(desk: Desk, authority: Authority) -> None:
    device = sender()
    folder = show(desk, (device, write_log(device, since=SINCE_H)))
    [problem] = problems(folder, authority, stamped(authority, device), policy="1.2.3")
    assert "under 1.3.6.1.4.1.99999.1, not 1.2.3" in problem
    [problem] = problems(folder, authority, stamped(authority, device, fleet="other"))
    assert "of fleet 'other'" in problem


def test_stamps_of_more_logs_than_fit_into_memory_are_named(
    desk: Desk, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, other = sender(), sender("pi-08", 8, "5f0c2f6e-1a54-4d0b-9a53-000000000009")
    folder = show(desk, *((each, write_log(each, since=SINCE_H)) for each in (device, other)))
    stamps = [stamped(authority, device, other) for _ in range(2)]
    monkeypatch.setattr("outstation.evidence.verify.stamps.READ_LIMITS", ReadLimits(stamped_logs=3))
    [problem] = problems(folder, authority, *stamps)
    assert "cover more than 3 logs" in problem


@given(st.integers(0, 2000), st.integers(1, 255))
def test_no_damaged_byte_of_a_response_changes_its_time(place: int, flip: int) -> None:
    good = _good_stamp()
    damaged = bytearray(good.response)
    damaged[place % len(damaged)] ^= flip
    try:
        content = token.verify(msgspec.structs.replace(good, response=bytes(damaged)), _TRUST[0])
    except MessageRefused:
        return
    assert content == token.verify(good, _TRUST[0])


@given(st.binary(max_size=300))
def test_no_bytes_break_the_parser_of_a_response(junk: bytes) -> None:
    with pytest.raises(MessageRefused):
        token.check(msgspec.structs.replace(_good_stamp(), response=junk))


_GOOD: list[Stamp] = []
_TRUST: list[token.TimestampTrust] = []


@pytest.fixture(autouse=True, scope="module")
def _make_good_stamp(authority: Authority) -> None:
    device = sender()
    device.results()
    _GOOD.append(stamped(authority, device))
    _TRUST.append(token.load_trust(authority.root))


def _good_stamp() -> Stamp:
    return _GOOD[0]


def test_the_commands_stamp_include_and_verify(desk: Desk, authority: Authority, tmp_path: Path) -> None:
    device = sender()
    messages = write_log(device, since=SINCE_H)
    folder = show(desk, (device, messages))
    home, out = tmp_path / "1" / "acme", tmp_path / "2026.11"
    arguments = ["fleet", "evidence", "stamp", "--dir", str(home), "--out", str(out), "--json"]
    with authority.serve() as url:
        run = call_outstation(*arguments, "--timestamp-url", url, "--timestamp-ca", str(authority.root))
        assert (run.returncode, run.stderr) == (0, "")
        assert msgspec.json.decode(run.stdout)["logs"] == 1
        again = call_outstation(*arguments, "--timestamp-url", url)
        assert (again.returncode, "a stamp is never overwritten" in again.stderr) == (2, True)
    # Another tool for RFC 3161 reads the files.
    command = f"openssl ts -verify -in {out}.tsr -queryfile {out}.tsq -CAfile {authority.root}".split()
    assert b"Verification: OK" in subprocess.run(command, capture_output=True, check=True).stdout
    made = call_outstation(*arguments[:2], *arguments[3:5], "--out", str(tmp_path / "e"), "--witness", f"{out}.tsr")
    assert made.returncode == 0, made.stderr
    cut = show(desk, (device, messages[:-3]))
    keys = ("--operator", str(home / "operator.key.pub"), "--operator", OPERATOR["key"].public.text)
    for path, words, code in ((tmp_path / "e", "VERIFIED", 0), (folder, "VERIFIED", 0), (cut, "cut off", 1)):
        trusted = ("--witness", f"{out}.tsr", "--timestamp-ca", str(authority.root), "--timestamp-policy", POLICY)
        run = call_outstation("fleet", "evidence", "verify", str(path), *keys, *trusted)
        assert (run.returncode, words in run.stdout) == (code, True), run.stdout


def _hang(handler: BaseHTTPRequestHandler, _request: bytes) -> None:
    while True:
        handler.wfile.write(b"H")
        time.sleep(0.05)


def _redirect(handler: BaseHTTPRequestHandler, _request: bytes) -> None:
    handler.send_response(302)
    handler.send_header("Location", "http://127.0.0.1:9/")
    handler.end_headers()


def _fail(handler: BaseHTTPRequestHandler, _request: bytes) -> None:
    handler.send_error(503)


def _flood(handler: BaseHTTPRequestHandler, _request: bytes) -> None:
    send(handler, b"\x30" * 1_000_000)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (_fail, "HTTP 503: Service Unavailable"),
        (_hang, "no response within 0.5 s"),
        (_redirect, "HTTP 302: a redirect, which is not followed"),
        (_flood, "a response of more than 65536 bytes is no time stamp"),
        ("digest", "another document"),
        ("nonce", "another nonce"),
    ],
)
def test_a_faulty_authority_gives_no_time_stamp(
    desk: Desk, authority: Authority, tmp_path: Path, answer: object, words: str
) -> None:
    device = sender()
    show(desk, (device, write_log(device, since=SINCE_H)))
    out = tmp_path / "stamp"
    home = tmp_path / "1" / "acme"
    store = FleetStore(home / "fleet.db", read_only=True)
    with store.snapshot() as db:
        heads = log_heads.encode(FLEET, EvidenceQueries(store, db).stream_heads())
    store.close()

    def trick(handler: BaseHTTPRequestHandler, request: bytes) -> None:
        if answer == "nonce":
            send(handler, authority.reply(token.create_request(heads)))
        elif answer == "digest":
            other = bytearray(request)
            other[request.index(bytes.fromhex("0420")) + 2] ^= 1
            send(handler, authority.reply(bytes(other)))
        else:
            assert callable(answer)
            answer(handler, request)

    with authority.serve(trick) as url:
        arguments = ["--out", str(out), "--timestamp-url", url, "--timeout", "0.5" if answer is _hang else "20"]
        run = call_outstation("fleet", "evidence", "stamp", "--dir", str(home), *arguments)
    assert run.returncode == 2
    assert words in run.stderr
    # The same command may be tried again.
    assert list(tmp_path.glob("stamp*")) == []


@pytest.fixture(scope="module", params=DATABASES)
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], FleetStore]:
    return fresh_in(request, tmp_path_factory)


def test_the_heads_are_the_newest_messages_of_all_logs(fresh: Callable[[], FleetStore]) -> None:
    store, devices = fresh(), [sender(), sender("pi-08", 8, "5f0c2f6e-1a54-4d0b-9a53-000000000009")]
    for device in devices:
        store.enrol(device.device, device.key.public, replace=False, now=at(0))
        store.ingest([Arrival(device.verify(device.results())) for _ in range(3)], [], at(1))
    # A gap before the newest one.
    devices[1].results()
    store.ingest([Arrival(devices[1].verify(devices[1].results()))], [], at(2))
    with store.snapshot() as db:
        heads = log_heads.decode(log_heads.encode(FLEET, EvidenceQueries(store, db).stream_heads())).heads
    assert heads == [log_heads.LogEnd(device.device, device.log, device.seq, device.prev) for device in devices]
    store.close()
    with pytest.raises(UsageError, match="no message"):
        log_heads.encode(FLEET, [])
