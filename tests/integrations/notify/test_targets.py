"""Targets of notifications against real servers: signatures, TLS, logins, faults, hostile texts, secrets."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec
import pytest

from outstation.integrations.notify import delivery
from outstation.integrations.notify.config import AppriseTarget, EmailTarget, MqttTarget, WebhookTarget
from outstation.integrations.notify.delivery import SendFailed, backoff_s
from outstation.integrations.notify.message import MAX_SUBJECT, Change, Notification, compose, compose_open
from outstation.integrations.notify.sending import find_exposed_secret, send
from outstation.protocol.alerts.incident import Incident
from outstation.protocol.alerts.kinds import FIELD_DRIFT
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.workbench.testing.broker import MosquittoBroker
from scripts.kit.broker_client import receive_messages
from tests.integrations.notify.servers import HookServer, hook_server, mailbox

UTC = ZoneInfo("UTC")
HOSTILE = [
    "<script>alert(1)</script> [x](javascript:1) *b*",
    "ax \x1b[31mred\x1b]0;title\x07",
    "line\r\nBcc: victim@example.org\r\n\r\nbody",
    "\u202egnp.exe\u2066 \u200f\u061c",
    "\x00nul \ud7ff \U000e0041",
    "x" * 10_000,
    "😀" * 10_000,
]


def alert(summary: str = "ax: the mean moved.", **changes: object) -> Incident:
    time_text = "2026-11-24T22:18:01.000000Z"
    made = Incident(
        status="raised",
        severity="warning",
        device="pi-07",
        task="exercise",
        alert="drift",
        subject="ax",
        summary=summary,
        raised=time_text,
        updated=time_text,
        id="exercise/ax/drift/1",
        seq=1,
        raised_seq=1,
        ref="3f9a00112233",
    )
    return msgspec.structs.replace(made, **changes)


def message(*alerts: Incident) -> Notification:
    changes = [Change(each, "raised") for each in alerts or (alert(),)]
    return compose("hook", changes, sender="acme", fleet="acme", zone=UTC, now_s=1.8e9, is_digest=False)


@pytest.fixture
def hook() -> Iterator[HookServer]:
    with hook_server() as opened:
        yield opened


def test_a_webhook_gets_a_signed_document_with_a_key_that_stays_the_same(hook: HookServer, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret\n")
    target = WebhookTarget(url=hook.url, secret_file=str(tmp_path / "secret"))
    send(target, message())
    send(target, message())
    first, second = hook.posts
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    stamp, digest = (part.split("=")[1] for part in first.headers["outstation-signature"].split(","))
    assert digest == hmac.new(b"s3cret", stamp.encode() + b"." + first.body, hashlib.sha256).hexdigest()
    assert abs(int(stamp) - time.time()) < 60
    document = json.loads(first.body)
    assert document["alerts"][0]["device"] == "pi-07"
    assert document["subject"] == "[warning] pi-07: ax: the mean moved."
    assert document["alerts"][0]["action"] == FIELD_DRIFT.action


@pytest.mark.parametrize(("status", "is_rejected"), [(500, False), (404, False), (413, True), (401, False)])
def test_a_webhook_that_refuses_says_so_without_its_token(hook: HookServer, status: int, is_rejected: bool) -> None:
    hook.status, hook.headers = status, {"Retry-After": "120"}
    with pytest.raises(SendFailed, match=f"answers {status}") as failed:
        send(WebhookTarget(url=hook.url), message())
    assert (failed.value.is_rejected, failed.value.retry_after_s) == (is_rejected, 120.0)
    assert "t0k3n" not in str(failed.value)
    assert "\x1b" not in str(failed.value)


def test_a_server_that_gives_no_reason_is_quoted_without_a_gap(hook: HookServer) -> None:
    hook.status, hook.answer = 500, b""
    with pytest.raises(SendFailed, match=r"answers 500$"):
        send(WebhookTarget(url=hook.url), message())


@pytest.mark.parametrize("right", [0o001, 0o002, 0o004])
def test_a_secret_that_any_user_may_read_or_replace_is_exposed(tmp_path: Path, right: int) -> None:
    file = tmp_path / "secret"
    file.write_text("s3cret\n")
    target = WebhookTarget(url="https://example.org", secret_file=str(file))
    file.chmod(0o640 | right)
    assert find_exposed_secret(target) == file
    file.chmod(0o640)
    assert find_exposed_secret(target) is None


def test_a_redirect_is_not_followed(hook: HookServer, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret")
    with hook_server() as other:
        hook.status, hook.headers = 307, {"Location": other.url}
        with pytest.raises(SendFailed, match=f"redirects to 127.0.0.1:{other.port}, which is not followed"):
            send(WebhookTarget(url=hook.url, secret_file=str(tmp_path / "secret")), message())
        assert other.posts == []


@pytest.mark.parametrize("fault", ["hangs", "drips"])
def test_a_webhook_that_never_ends_its_answer_is_given_up(
    hook: HookServer, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("outstation.integrations.notify.webhook.TIMEOUT_S", 1.0)
    monkeypatch.setattr(
        "outstation.integrations.notify.webhook.limit_total", lambda find: delivery.limit_total(find, 1.5)
    )
    hook.hang_s, hook.drip = (20.0 if fault == "hangs" else 0.0), fault == "drips"
    began = time.monotonic()
    with pytest.raises(SendFailed):
        send(WebhookTarget(url=hook.url), message())
    assert time.monotonic() - began < 15
    hook.drip = False


def test_a_missing_secret_is_named_by_its_file_alone(hook: HookServer, tmp_path: Path) -> None:
    with pytest.raises(SendFailed, match="no such file; it holds the shared secret"):
        send(WebhookTarget(url=hook.url, secret_file=str(tmp_path / "none")), message())
    (tmp_path / "two").write_text("one\ntwo\n")
    with pytest.raises(SendFailed, match="one line") as failed:
        send(WebhookTarget(url=hook.url, secret_file=str(tmp_path / "two")), message())
    assert "one\ntwo" not in str(failed.value)
    assert hook.posts == []


# Of the server, which also complains when a client hangs up on its certificate.
@pytest.mark.filterwarnings("ignore:Requiring AUTH", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_mail_goes_over_tls_with_a_login(tmp_path: Path, security: str) -> None:
    (tmp_path / "password").write_text("pa ss\n")
    with mailbox(tmp_path, security=security, password="pa ss") as box:
        target = EmailTarget(
            host="localhost",
            port=box.port,
            security=security,  # type: ignore[arg-type]
            sender="fleet@example.org",
            to=["eva@example.org", "ada@example.org"],
            username="fleet",
            password_file=str(tmp_path / "password"),
            ca_file=str(tmp_path / "server.pem"),
        )
        send(target, message())
        send(target, message())
        first, second = box.mails
        assert first["Message-ID"] == second["Message-ID"] == f"<{message().key}@example.org>"
        assert first["Subject"] == "[warning] pi-07: ax: the mean moved."
        assert first["To"] == "eva@example.org, ada@example.org"
        assert first["Auto-Submitted"] == "auto-generated"
        assert f"What to do: {FIELD_DRIFT.action}" in first.get_content()
        (tmp_path / "password").write_text("wrong")
        with pytest.raises(SendFailed, match="refuses user name and password") as failed:
            send(target, message())
        assert "wrong" not in str(failed.value)
        untrusting = msgspec.structs.replace(target, ca_file=None)
        with pytest.raises(SendFailed, match="certificate verify failed"):
            send(untrusting, message())


def test_mail_that_the_server_refuses_fails(tmp_path: Path) -> None:
    with mailbox(tmp_path, security="none") as box:
        target = EmailTarget(
            host="127.0.0.1", port=box.port, security="none", sender="a@example.org", to=["b@example.org"]
        )
        box.answer = "451 try \x1b[31mlater"
        with pytest.raises(SendFailed, match="451") as failed:
            send(target, message())
        assert not failed.value.is_rejected
        assert "\x1b" not in str(failed.value)
        box.answer = "552 too large"
        with pytest.raises(SendFailed) as failed:
            send(target, message())
        assert failed.value.is_rejected
        box.answer = "552"
        with pytest.raises(SendFailed, match=r"answers 552$"):
            send(target, message())
        box.recipient_answer = "550"
        with pytest.raises(SendFailed, match=r"refuses all 1 recipients: 550$"):
            send(target, message())


def test_a_server_that_does_not_listen_is_named_with_a_remedy() -> None:
    mail = EmailTarget(host="127.0.0.1", port=1, security="none", sender="a@example.org", to=["b@example.org"])
    broker = BrokerConfig(url="mqtt://127.0.0.1:1")
    hook = WebhookTarget(url="http://127.0.0.1:1/x")
    for target, noun in ((hook, "server"), (mail, "server"), (MqttTarget(topic="alerts", broker=broker), "broker")):
        with pytest.raises(
            SendFailed, match=rf"127\.0\.0\.1:1: Connection refused; nothing listens .*start the {noun},"
        ):
            send(target, message())


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_harmless_in_mail_and_webhook(hook: HookServer, tmp_path: Path, text: str) -> None:
    hostile = alert(text, device=text[:200], task=text[:200], subject=text, cleared_summary=text)
    with mailbox(tmp_path, security="none") as box:
        target = EmailTarget(
            host="127.0.0.1", port=box.port, security="none", sender="a@example.org", to=["b@example.org"]
        )
        send(target, message(hostile))
        [mail] = box.mails
        [envelope] = box.envelopes
    send(WebhookTarget(url=hook.url), message(hostile))
    assert envelope.rcpt_tos == ["b@example.org"]
    assert {"bcc", "x-injected"}.isdisjoint(name.lower() for name in mail)
    assert mail.get_content_type() == "text/plain"
    body, subject = mail.get_content(), str(mail["Subject"])
    assert len(subject) <= MAX_SUBJECT
    assert subject.isprintable()
    assert all(line.isprintable() for line in body.splitlines())
    assert len(body) < 10_000
    document = json.loads(hook.posts[0].body)
    assert all(str(value).isprintable() for value in document["alerts"][0].values())


def test_a_broker_that_closes_late_does_not_delay_the_outcome() -> None:
    """Otherwise a process that stops meanwhile sends the accepted message again."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> bytes:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"\x20\x03\x00\x00\x00")
                sent = connection.recv(65_536)
                topic_end = sent.index(b"notify/acme") + len(b"notify/acme")
                connection.sendall(b"\x40\x02" + sent[topic_end : topic_end + 2])
                rest = b"".join(iter(lambda: connection.recv(4096), b""))
                returned.wait(10.0)
                return rest

        returned = threading.Event()
        with ThreadPoolExecutor(1) as server_thread:
            done = server_thread.submit(answer)
            broker = BrokerConfig(url=f"mqtt://127.0.0.1:{server.getsockname()[1]}")
            begin = time.monotonic()
            send(MqttTarget(topic="notify/acme", broker=broker), message())
            took_s = time.monotonic() - begin
            returned.set()
            assert done.result()[:1] == b"\xe0", "DISCONNECT was sent"
    assert took_s < 1.5, "a link waits 2 s for the broker to close"


def test_the_retained_document_lists_the_open_alerts(outstation_broker: MosquittoBroker) -> None:
    broker = BrokerConfig(url=outstation_broker.url)
    target = MqttTarget(topic="notify/acme", broker=broker)
    send(target, compose_open([alert()], sender="acme", fleet="acme", now_s=1.8e9))
    with Link(broker, "reader", subscribe=["notify/acme"]) as link:
        [delivery] = receive_messages(link, 1)
    document = json.loads(delivery.payload)
    assert delivery.retained
    assert (document["open"], document["severity"], document["alerts"][0]["device"]) == (1, "warning", "pi-07")


def test_a_broker_that_retains_nothing_is_explained_also_by_a_test(tmp_path: Path) -> None:
    with MosquittoBroker(tmp_path, extra_conf="retain_available false") as broker:
        target = MqttTarget(topic="notify/acme", broker=BrokerConfig(url=broker.url))
        for sent in (compose_open([alert()], sender="acme", fleet="acme", now_s=1.8e9), message()):
            with pytest.raises(SendFailed, match=r"retains nothing.*retain_available"):
                send(target, sent)


def test_apprise_tells_its_services_and_hides_their_urls(hook: HookServer, tmp_path: Path) -> None:
    pytest.importorskip("apprise")
    (tmp_path / "url").write_text(f"json://user:geheim@127.0.0.1:{hook.port}/")
    target = AppriseTarget(url_file=str(tmp_path / "url"))
    send(target, message())
    assert json.loads(hook.posts[0].body)["title"] == "[warning] pi-07: ax: the mean moved."
    hook.status = 500
    with pytest.raises(SendFailed) as failed:
        send(target, message())
    assert "geheim" not in str(failed.value)
    (tmp_path / "url").write_text("nosuchservice://geheim")
    with pytest.raises(SendFailed, match="Apprise takes no such URL of scheme 'nosuchservice'") as failed:
        send(target, message())
    assert "geheim" not in str(failed.value)


def test_the_backoff_grows_to_an_hour_and_obeys_the_target() -> None:
    for failures in range(1, 40):
        full = min(5.0 * 2 ** (failures - 1), 3600.0)
        assert full / 2 <= backoff_s(failures) <= full
    assert backoff_s(1, 120.0) == 120.0
    assert backoff_s(1, 1e9) == 3600.0


def test_a_webhook_that_closes_after_its_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "outstation.integrations.notify.webhook.limit_total", lambda find: delivery.limit_total(find, 1.0)
    )
    with dripping_server(b"HTTP/1.1 500 Broken\r\nConnection: close\r\n\r\n") as url:
        began = time.monotonic()
        with pytest.raises(SendFailed):
            send(WebhookTarget(url=url), message())
        assert time.monotonic() - began < 15


def test_a_webhook_that_accepts_and_never_ends_its_answer_has_accepted() -> None:
    with dripping_server(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n") as url:
        began = time.monotonic()
        send(WebhookTarget(url=url), message())
        assert time.monotonic() - began < 15


@contextlib.contextmanager
def dripping_server(head: bytes) -> Iterator[str]:
    """Answer one request with `head`, and a body of a byte each 0.2 s."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with listening.accept()[0] as accepted, contextlib.suppress(OSError):
                accepted.recv(65536)
                accepted.sendall(head)
                for _ in range(200):
                    accepted.sendall(b"x")
                    time.sleep(0.2)

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
