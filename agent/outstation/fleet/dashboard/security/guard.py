"""The guard before every page: host, origin, size and time of a request, and the headers of every response.

A name that another site points at this machine (DNS rebinding) is refused by its Host header; a form of another site by
Sec-Fetch-Site and Origin. Bodies are read here, as a whole, before a page sees them.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 16 << 10
MAX_TARGET, MAX_HEADERS = 4096, 16 << 10
_BODY_TIMEOUT_S = 10.0
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # With no-referrer, a form would send the origin `null`.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
_FORM = "application/x-www-form-urlencoded"


class _Refused(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class HostPolicy(msgspec.Struct, frozen=True):
    """Host names that a browser may use. An IP address needs no list: no other site can have it as its name."""

    names: frozenset[str]

    def allows(self, host: str) -> bool:
        name = _host_name(host)
        return name in self.names or name == "localhost" or _parse_address(name) is not None


def is_loopback(address: str) -> bool:
    parsed = _parse_address(address)
    return parsed is not None and parsed.is_loopback


def make_host_policy(names: Iterable[str]) -> HostPolicy:
    return HostPolicy(frozenset(name.lower() for name in names))


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, hosts: HostPolicy, *, tls: bool) -> None:
        self._app, self._hosts = app, hosts
        self._headers = {**_HEADERS, **({"strict-transport-security": "max-age=31536000"} if tls else {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            self._check(scope)
            body = await _read_body(scope, receive) if scope["method"] == "POST" else b""
            if _has_nul(body):
                raise _Refused(400, "the form holds a NUL character, which no text here has")
        except _Refused as refused:
            refusal = PlainTextResponse(f"{refused}\n", refused.status, {"connection": "close"})
            await refusal(scope, receive, send_guarded)
            return
        await self._app(scope, _replay(body, receive) if scope["method"] == "POST" else receive, send_guarded)

    def _check(self, scope: Scope) -> None:
        """Raise _Refused for a request that no page of this dashboard makes."""
        headers = Headers(scope=scope)
        method = scope["method"]
        if method not in ("GET", "HEAD", "POST"):
            raise _Refused(405, "method not allowed")
        target = scope["raw_path"] + b"?" + scope["query_string"]
        if len(target) > MAX_TARGET:
            raise _Refused(414, "the address is too long")
        if _has_nul(target) or "\0" in scope["path"]:
            raise _Refused(400, "the address holds a NUL character, which no text here has")
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
            raise _Refused(431, "the headers are too long")
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy could see another request than this server.
            raise _Refused(400, "a request has a length or chunks, not both")
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._hosts.allows(hosts[0]):
            raise _Refused(421, "this host name is not served here; start the dashboard with --host NAME to allow it")
        site = headers.get("sec-fetch-site", "")
        if method == "POST":
            origin = headers.get("origin")
            if site not in ("", "same-origin") or (origin is None and not site):
                raise _Refused(403, "this form did not come from the dashboard; open its page and repeat the action")
            if origin is not None and urlsplit(origin).netloc.lower() != hosts[0].lower():
                raise _Refused(403, "this form came from another site")
            if headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
                raise _Refused(415, f"a form must be {_FORM}")
        elif site in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
            raise _Refused(403, "another site may link to the dashboard, and not load its parts")


def _has_nul(encoded: bytes) -> bool:
    """Return True if URL-encoded text holds NUL, which PostgreSQL stores in no text."""
    return b"\0" in encoded or b"%00" in encoded


async def _read_body(scope: Scope, receive: Receive) -> bytes:
    length = Headers(scope=scope).get("content-length", "0")
    if not length.isdigit() or int(length) > MAX_BODY:
        raise _Refused(413, f"a form has at most {MAX_BODY} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise _Refused(400, "the request ended early")
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    raise _Refused(413, f"a form has at most {MAX_BODY} bytes")
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise _Refused(408, "the form did not arrive in time") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body that was read, and then the connection's own messages."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def _host_name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
