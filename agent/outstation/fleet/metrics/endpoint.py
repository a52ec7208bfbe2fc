"""The HTTP side: `/metrics` among the dashboard's pages, and a listener of the collector's own in a thread.

Allowed are requests with the bearer token of `[metrics] token_file`, and such that began on this machine (at the
dashboard: visitors whom it knows).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from outstation.fleet.config import FILE, MetricsConfig
from outstation.fleet.dashboard.pages.visit import Dashboard
from outstation.fleet.dashboard.security.access import is_local
from outstation.fleet.dashboard.security.guard import is_loopback
from outstation.fleet.dashboard.server import Listener, create_server, open_socket, parse_listen
from outstation.fleet.metrics.device_families import build_families
from outstation.fleet.metrics.exporter import CONTENT_TYPE, DatabaseExporter, load_totals, render
from outstation.foundation import clock
from outstation.foundation.errors import ConfigError, OutstationError

logger = logging.getLogger(__name__)

MIN_TOKEN_LENGTH = 32
# Below ingest, which shares the process.
_NICE = 10
_STOP_TIMEOUT_S = 5.0


def load_token(config: MetricsConfig) -> bytes:
    """Return the token, empty without one. Raises ConfigError."""
    if config.token_file is None:
        return b""
    try:
        token = Path(config.token_file).read_bytes().strip()
    except OSError as error:
        problem = f"{config.token_file}: {error.strerror}; write at least {MIN_TOKEN_LENGTH} random characters to it"
        raise ConfigError(FILE, "metrics.token_file", problem) from None
    if len(token) < MIN_TOKEN_LENGTH:
        problem = f"{config.token_file} holds {len(token)} characters; a token has at least {MIN_TOKEN_LENGTH}"
        raise ConfigError(FILE, "metrics.token_file", problem)
    return token


def dashboard_route(dashboard: Dashboard, token: bytes) -> Route:
    """Return the route of `/metrics` among the dashboard's pages, over the state that they show."""

    async def show(request: Request) -> Response:
        if not _has_token(request, token) and await dashboard.access.identify(request) is None:
            return _refuse()
        totals = None
        with contextlib.suppress(OutstationError):
            totals = await dashboard.reader.read(load_totals)
        state = dashboard.state
        # The feed replaces devices while a thread renders these.
        devices, now_us = [*state.devices.values()], clock.read().wall_us
        families = build_families(dashboard.fleet, devices, state.collector_alerts, totals, state.read_us, now_us)
        text = await dashboard.reader.run_aside(lambda _: render(families))
        return Response(text, media_type=CONTENT_TYPE)

    return Route("/metrics", show, methods=["GET"])


class MetricsListener:
    """Serves the collector's metrics in a thread of its own. Raises ConfigError, and UsageError for a taken port."""

    def __init__(self, config: MetricsConfig, exporter: DatabaseExporter) -> None:
        token = load_token(config)
        host, port = parse_listen(config.listen)
        if not (is_loopback(host) or host == "localhost"):
            if not token:
                problem = f"{config.listen} is reachable from other machines, so token_file is needed; or use 127.0.0.1"
                raise ConfigError(FILE, "metrics.listen", problem)
            if config.cert_file is None:
                logger.warning("metrics: the token crosses the network unencrypted; set [metrics] cert_file")
        listener = Listener(host, port, config.cert_file, config.tls_key_file)
        self._exporter = exporter
        self._readers = ThreadPoolExecutor(1, "metrics", initializer=_lower_priority)
        self._server = create_server(self._create_app(token), listener, lambda: None)
        self._socket = open_socket(listener)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="metrics-http", daemon=True
        )

    def start(self) -> None:
        """Accept requests; the first ones wait until the thread runs."""
        self._socket.listen()
        self._thread.start()
        logger.info("metrics: %s:%d/metrics", *self.address)

    def stop(self) -> None:
        """End the thread; one that hangs is left to the end of the process."""
        self._server.should_exit = True
        self._thread.join(_STOP_TIMEOUT_S)
        self._socket.close()

    def _create_app(self, token: bytes) -> Starlette:
        async def show(request: Request) -> Response:
            if not _has_token(request, token) and not is_local(request):
                return _refuse()
            text = await asyncio.get_running_loop().run_in_executor(self._readers, self._exporter.read)
            return Response(text, media_type=CONTENT_TYPE)

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            # The database is closed in the thread that opened it.
            self._readers.submit(self._exporter.close)
            self._readers.shutdown(wait=False)

        return Starlette(routes=[Route("/metrics", show, methods=["GET"])], lifespan=lifespan)


def _has_token(request: Request, token: bytes) -> bool:
    given = request.headers.get("authorization", "").encode(errors="replace")
    return bool(token) and hmac.compare_digest(given, b"Bearer " + token)


def _refuse() -> Response:
    advice = "send the bearer token of [metrics] token_file, or ask from this machine\n"
    return PlainTextResponse(advice, 401, {"www-authenticate": "Bearer"})


def _lower_priority() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
