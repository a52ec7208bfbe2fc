"""Webhook: a JSON document by HTTP POST, signed with HMAC-SHA256 over the time and the body.

`Outstation-Signature: t=<epoch seconds>,v1=<hex>` is the HMAC of `<t>.<body>`; a receiver compares it, refuses a `t`
that is minutes old, and remembers `Idempotency-Key`, which stays the same when a message is sent again. No redirect is
followed: the signed document goes to the configured host alone.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import socket
import ssl
import time
from urllib.parse import urlsplit

from outstation import __version__
from outstation.foundation.errors import explain
from outstation.integrations.notify.config import WebhookTarget
from outstation.integrations.notify.delivery import TIMEOUT_S, SendFailed, describe, limit_total, read_secret
from outstation.integrations.notify.message import Notification, encode, shorten

MAX_ANSWER = 500
# The receiver refuses this very message; any other failure may pass.
_REJECTING = frozenset({400, 405, 406, 409, 410, 411, 413, 414, 415, 422})


def sign(secret: str, body: bytes, now_s: int) -> str:
    """Return the value of the signature header."""
    digest = hmac.new(secret.encode(), f"{now_s}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={now_s},v1={digest}"


def check(target: WebhookTarget) -> str:
    """Return a line about the target. Raises UsageError."""
    if target.secret_file:
        read_secret(target.secret_file, "the shared secret of a webhook")
    signed = "signed" if target.secret_file else "not signed: set secret_file"
    return f"webhook at {urlsplit(target.url).netloc}, {signed}"


def send(target: WebhookTarget, message: Notification) -> None:
    """Post the message. Raises SendFailed, and UsageError for a secret that cannot be read."""
    body = encode(message)
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"outstation/{__version__}",
        "Idempotency-Key": message.key,
    }
    if target.secret_file is not None:
        secret = read_secret(target.secret_file, "the shared secret of a webhook")
        headers["Outstation-Signature"] = sign(secret, body, int(time.time()))
    parts = urlsplit(target.url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = _connect(target, parts.hostname or "", parts.port)
    try:
        opened: socket.socket | None = None
        with limit_total(lambda: opened or connection.sock):
            connection.connect()
            # A response after which the server closes takes the socket from the connection.
            opened = connection.sock
            connection.request("POST", path, body, headers)
            with connection.getresponse() as response:
                # An accepted message must not be sent again because the rest of the answer does not arrive.
                answer = b"" if 200 <= response.status < 300 else response.read(MAX_ANSWER)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise SendFailed(f"{_name(target)}: {describe(error)}") from None
    finally:
        connection.close()
    _check(target, response, answer)


def _connect(target: WebhookTarget, host: str, port: int | None) -> http.client.HTTPConnection:
    if not target.url.startswith("https:"):
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        context = ssl.create_default_context(cafile=target.ca_file)
    except OSError as error:
        raise SendFailed(f"{target.ca_file}: {explain(error)}; it holds the certificates that are trusted") from None
    return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)


def _check(target: WebhookTarget, response: http.client.HTTPResponse, answer: bytes) -> None:
    if 200 <= response.status < 300:
        return
    if 300 <= response.status < 400:
        place = urlsplit(response.headers.get("Location", "")).netloc or "another path"
        problem = f"redirects to {shorten(place, 80)}, which is not followed; write the final URL"
        raise SendFailed(f"{_name(target)}: {problem}")
    text = shorten(answer.decode(errors="replace"), 200)
    raise SendFailed(
        f"{_name(target)}: answers {response.status} {text}".rstrip(),
        is_rejected=response.status in _REJECTING,
        retry_after_s=_parse_retry_after(response.headers.get("Retry-After", "")),
    )


def _parse_retry_after(text: str) -> float | None:
    """Return the seconds; a date is not read, the back-off serves as well."""
    return float(text) if text.isascii() and text.isdigit() and len(text) < 8 else None


def _name(target: WebhookTarget) -> str:
    """Return the URL without its path and query, which often hold a token."""
    parts = urlsplit(target.url)
    return f"{parts.scheme}://{parts.netloc}"
