"""Real servers that notifications are sent to: HTTP with faults, and SMTP with TLS and a login."""

from __future__ import annotations

import contextlib
import email
import email.policy
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope, LoginPassword, Session
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from outstation.integrations.notify.notifier import Notifier
from outstation.workbench.testing.broker import free_port


class Post:
    def __init__(self, path: str, headers: dict[str, str], body: bytes) -> None:
        self.path, self.headers, self.body = path, headers, body


class HookServer:
    """Answers `status`; `hang_s` waits before the answer, `drip` sends a byte of it each 0.2 s for ever."""

    def __init__(self) -> None:
        self.posts: list[Post] = []
        self.status, self.hang_s, self.drip, self.headers = 200, 0.0, False, dict[str, str]()
        self.answer = b"no \x1b[31m" * 100
        # Called with each post before the answer.
        self.on_post: Callable[[Post], object] = lambda _: None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                post = Post(self.path, {k.lower(): v for k, v in self.headers.items()}, b"")
                post.body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.posts.append(post)
                outer.on_post(post)
                time.sleep(outer.hang_s)
                with contextlib.suppress(OSError):
                    while outer.drip:
                        self.wfile.write(b"H")
                        time.sleep(0.2)
                    self.send_response(outer.status)
                    for name, value in outer.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(outer.answer)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook?token=t0k3n"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def is_idle(notifier: Notifier) -> bool:
    """Return True if no target is being sent to, or an outcome waits for the next turn."""
    return not any(worker.is_busy for worker in notifier._workers.values()) or not notifier._outcomes.empty()


class Mailbox:
    """An SMTP server that keeps what it accepts; `answer` and `recipient_answer` replace its answers."""

    def __init__(self, folder: Path, *, security: str, password: str | None = None) -> None:
        self.mails: list[EmailMessage] = []
        self.envelopes: list[Envelope] = []
        self.answer = self.recipient_answer = "250 OK"
        self._password = password
        context = make_tls(folder)
        options: dict[str, Any] = {"auth_required": password is not None, "authenticator": self._authenticate}
        if security == "starttls":
            options |= {"tls_context": context, "require_starttls": True}
        if security in ("tls", "none"):
            options |= {"auth_require_tls": False}
        self._controller = Controller(
            self, hostname="127.0.0.1", port=free_port(), ssl_context=context if security == "tls" else None, **options
        )
        self._controller.start()
        self.port = self._controller.port

    async def handle_RCPT(
        self, server: Any, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if self.recipient_answer.startswith("250"):
            envelope.rcpt_tos.append(address)
        return self.recipient_answer

    async def handle_DATA(self, server: Any, session: Session, envelope: Envelope) -> str:
        self.envelopes.append(envelope)
        if self.answer.startswith("250"):
            content = envelope.content
            assert isinstance(content, bytes)
            message = email.message_from_bytes(content, policy=email.policy.default)
            assert isinstance(message, EmailMessage)
            self.mails.append(message)
        return self.answer

    def _authenticate(self, server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        good = isinstance(data, LoginPassword) and data.password.decode() == self._password
        return AuthResult(success=good, handled=False)

    def close(self) -> None:
        self._controller.stop()


def make_tls(folder: Path) -> ssl.SSLContext:
    """Return a server's context for localhost; its certificate, which clients trust, is `server.pem` in `folder`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "server.pem").write_bytes(pem)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "server.key").write_bytes(private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return context


@contextlib.contextmanager
def mailbox(folder: Path, *, security: str = "starttls", password: str | None = None) -> Iterator[Mailbox]:
    with contextlib.closing(Mailbox(folder, security=security, password=password)) as opened:
        yield opened


@contextlib.contextmanager
def hook_server() -> Iterator[HookServer]:
    with contextlib.closing(HookServer()) as opened:
        yield opened
