"""Time-stamping authority: OpenSSL's, with certificates of its own, and a local web server in front of it."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

POLICY = "1.3.6.1.4.1.99999.1"
_CONFIG = f"""
[tsa]
default_tsa = authority
[authority]
serial = serial
crypto_device = builtin
signer_cert = tsa.pem
signer_key = tsa.key
certs = chain.pem
signer_digest = sha256
default_policy = {POLICY}
digests = sha256
accuracy = secs:1
ess_cert_id_alg = sha256
"""


class Authority:
    """An authority of one root. `root` is the PEM file that an auditor trusts."""

    def __init__(self, folder: Path, *, ended: bool = False) -> None:
        """Make keys and certificates; `ended`: the authority's own certificate ended a day ago."""
        folder.mkdir()
        self._folder, self.root = folder, folder / "chain.pem"
        root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        root_name, name = _name("root"), _name("authority")
        root = _builder(root_name, root_name, root_key.public_key(), 365)
        root = root.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        own = _builder(name, root_name, key.public_key(), -1 if ended else 90)
        own = own.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING]), critical=True)
        self.root.write_bytes(root.sign(root_key, hashes.SHA256()).public_bytes(Encoding.PEM))
        (folder / "tsa.pem").write_bytes(own.sign(root_key, hashes.SHA256()).public_bytes(Encoding.PEM))
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / "tsa.key").write_bytes(private)
        (folder / "serial").write_text("01\n", encoding="ascii")
        (folder / "config").write_text(_CONFIG, encoding="ascii")

    def reply(self, request: bytes) -> bytes:
        """Return the response to a request."""
        (self._folder / "request").write_bytes(request)
        command = ["openssl", "ts", "-reply", "-config", "config", "-queryfile", "request"]
        return subprocess.run(command, cwd=self._folder, check=True, capture_output=True).stdout

    @contextlib.contextmanager
    def serve(self, answer: Callable[[BaseHTTPRequestHandler, bytes], None] | None = None) -> Iterator[str]:
        """Serve over HTTP and yield the URL; `answer` writes another response than the authority's."""
        authority = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = self.rfile.read(int(self.headers["Content-Length"]))
                with contextlib.suppress(ConnectionError):
                    if answer is None:
                        send(self, authority.reply(request))
                    else:
                        answer(self, request)

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads, server.block_on_close = True, False
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}/"
            server.shutdown()


def send(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/timestamp-reply")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
    return builder.not_valid_before(now - timedelta(days=30)).not_valid_after(now + timedelta(days=days))
