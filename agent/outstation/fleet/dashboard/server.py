"""The HTTP server: uvicorn with limits on connections and on the time that a request may take to arrive."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from outstation.foundation.errors import ConfigError, UsageError

HEADER_TIMEOUT_S = 10.0
MAX_CONNECTIONS, MAX_PER_ADDRESS = 512, 128
_MAX_HEADER_BYTES = 16 << 10


class Listener(msgspec.Struct, frozen=True):
    """Address to listen at, and the files of the certificate; both None without TLS."""

    host: str
    port: int
    cert_file: str | None = None
    key_file: str | None = None

    @property
    def scheme(self) -> str:
        return "https" if self.cert_file else "http"


def parse_listen(text: str) -> tuple[str, int]:
    """Parse `HOST:PORT` or `[IPv6]:PORT`. Raises UsageError."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"--listen {text!r}: use HOST:PORT, such as 127.0.0.1:8480 or [::1]:8480")
    return host, int(port)


def open_socket(listener: Listener) -> socket.socket:
    """Return the listening socket. Raises UsageError."""
    where = f"{listener.host}:{listener.port}"
    try:
        family, *_, address = socket.getaddrinfo(listener.host, listener.port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        # The address is printed before the server runs: who connects then waits a moment.
        opened.listen(256)
    except OSError as error:
        raise UsageError(f"--listen {where}: {error.strerror}; choose another address or port") from None
    return opened


def create_server(app: ASGIApp, listener: Listener, before_stop: Callable[[], None]) -> uvicorn.Server:
    """Return a server; its `run(sockets=[…])` ends with SIGINT or SIGTERM. Raises ConfigError for a bad certificate.

    `before_stop` ends the responses that would never end by themselves.
    """
    protocol = type("Protocol", (_BoundedProtocol,), {"counts": Counter[str]()})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        ssl_certfile=listener.cert_file,
        ssl_keyfile=listener.key_file,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError("--tls-cert", "--tls-key", f"cannot be read: {error}") from None
    return _Server(config, before_stop)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, before_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._before_stop = before_stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._before_stop()
        await super().shutdown(sockets)


class _BoundedProtocol(H11Protocol):
    """Closes a connection whose request does not arrive in time, and the ones beyond the limit of an address."""

    counts: Counter[str]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline: Any = None
        self._address = self.client[0] if self.client else ""
        self.counts[self._address] += 1
        if self.counts[self._address] > MAX_PER_ADDRESS:
            transport.abort()
            return
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.counts[self._address] -= 1
        if not self.counts[self._address]:
            del self.counts[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and not self._has_request:
            self._expect_request()
        super().data_received(data)
        if self._has_request:
            self._stop_waiting()

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_request(self) -> None:
        self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, self._expire)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        if not self._has_request:
            self.transport.abort()
