"""The application: routes, the visitor of each request, errors as pages, and the life of the change feed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from outstation.fleet.dashboard import login
from outstation.fleet.dashboard.login import Endpoint
from outstation.fleet.dashboard.pages import (
    account,
    audit,
    device,
    fleet,
    incidents,
    labels,
    message,
    models,
    rollouts,
    tasks,
    views,
)
from outstation.fleet.dashboard.pages.visit import Dashboard, Page, Visit
from outstation.fleet.dashboard.security.guard import Guard, HostPolicy
from outstation.foundation.errors import OutstationError, StorageBusy, StorageError, UsageError

logger = logging.getLogger(__name__)

PAGES: tuple[tuple[str, str, Page], ...] = (
    ("GET", "/", account.home),
    ("POST", "/logout", account.logout),
    ("GET", "/accounts", account.show),
    ("POST", "/accounts", account.change),
    ("GET", "/fleet", fleet.show),
    ("GET", "/devices/{device}", device.show),
    ("GET", "/devices/{device}/results.json", device.results),
    ("GET", "/devices/{device}/drift.svg", device.drift),
    ("POST", "/devices/{device}/verdict", device.judge),
    ("GET", "/labels", labels.show),
    ("POST", "/incidents/{ref}/verdict", incidents.judge),
    ("GET", "/incidents", incidents.show),
    ("GET", "/incidents/{ref}", incidents.show_one),
    ("POST", "/incidents/{ref}", incidents.decide),
    ("GET", "/tasks", tasks.show),
    ("GET", "/tasks/{task}", tasks.show_one),
    ("GET", "/models", models.show),
    ("GET", "/models/{name}", models.show_one),
    ("GET", "/rollouts", rollouts.show),
    ("GET", "/rollouts/{name}", rollouts.show_one),
    ("POST", "/rollouts/{name}", rollouts.decide),
    ("GET", "/audit", audit.show),
    ("POST", "/audit/evidence", audit.evidence),
    ("GET", "/messages/{device}/{log}/{seq}", message.show),
    ("GET", "/messages/{device}/{log}/{seq}/download", message.download),
)
_HEADINGS = {401: "Signed out", 403: "Not allowed", 404: "Not here", 503: "Busy"}
_ADVICE = {401: "Sign in again.", 403: "Ask an administrator for another role.", 404: "Open the fleet."}
Handler = Callable[[Request, Exception], Awaitable[Response]]
_FILES = StaticFiles(directory=views.STATIC)


def create_app(dashboard: Dashboard, hosts: HostPolicy, routes: Sequence[Route] = ()) -> ASGIApp:
    """Return the application; `routes` are further ones, which check for themselves who asks."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await dashboard.feed.poll()
        polling = asyncio.create_task(dashboard.feed.run())
        yield
        polling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await polling
        dashboard.reader.close()

    app = Starlette(
        routes=[
            Route("/static/{name}", _static, methods=["GET"]),
            Route("/login", login.show_form(dashboard), methods=["GET"]),
            Route("/login", login.sign_in(dashboard), methods=["POST"]),
            Route("/events", _events(dashboard), methods=["GET"]),
            *(Route(path, _for_visitor(dashboard, page), methods=[method]) for method, path, page in PAGES),
            *routes,
        ],
        middleware=[Middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)],
        exception_handlers={
            HTTPException: _show_http_error(dashboard),
            OutstationError: _show_storage_error(dashboard),
            Exception: _show_failure(dashboard),
        },
        lifespan=lifespan,
    )
    return Guard(app, hosts, tls=dashboard.access.policy.tls)


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name.startswith(".") or not (views.STATIC / name).is_file():
        raise HTTPException(404, "there is no such file")
    response = await _FILES.get_response(name, request.scope)
    response.headers["cache-control"] = "public, max-age=31536000, immutable"
    return response


def _for_visitor(dashboard: Dashboard, page: Page) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        visitor = request.state.visitor = await dashboard.access.identify(request)
        return login.ask(request) if visitor is None else await page(Visit(dashboard, request, visitor))

    return endpoint


def _events(dashboard: Dashboard) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        if await dashboard.access.identify(request) is None:
            raise HTTPException(401, "sign in")
        if dashboard.feed.is_full:
            raise HTTPException(503, "too many pages are open; close some")

        async def still_allowed() -> bool:
            try:
                return await dashboard.access.identify(request) is not None
            except OutstationError:
                # The page says so already; the session is checked again when the database is back.
                return True

        headers = {"x-accel-buffering": "no"}
        return StreamingResponse(dashboard.feed.listen(still_allowed), 200, headers, "text/event-stream")

    return endpoint


def _show_http_error(dashboard: Dashboard) -> Handler:
    async def handler(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = error.status_code
        response = dashboard.render(
            request,
            getattr(request.state, "visitor", None),
            "error.html",
            http_status=code,
            heading=_HEADINGS.get(code, "Not possible"),
            detail=error.detail,
            advice=_ADVICE.get(code, ""),
        )
        response.headers.update(error.headers or {})
        return response

    return handler


def _show_storage_error(dashboard: Dashboard) -> Handler:
    async def handler(request: Request, error: Exception) -> Response:
        visitor = getattr(request.state, "visitor", None)
        if isinstance(error, StorageBusy) and request.method == "POST":
            texts = {"heading": "Busy", "detail": str(error), "advice": "Go back and try again; nothing was changed."}
            return dashboard.render(request, visitor, "error.html", http_status=503, **texts)
        if isinstance(error, UsageError) and request.method == "POST":
            texts = {"heading": "Not done", "detail": str(error), "advice": "Go back and change it."}
            return dashboard.render(request, visitor, "error.html", http_status=409, **texts)
        if not isinstance(error, StorageError | UsageError):
            raise error
        advice = "This page comes back by itself when the database does; nothing is lost, devices keep their messages."
        # Without a session nobody learns where the database is.
        texts = {"heading": "The database is not available", "detail": str(error) if visitor else "", "advice": advice}
        response = dashboard.render(request, visitor, "error.html", http_status=503, watch="*", **texts)
        response.headers["retry-after"] = "3"
        return response

    return handler


def _show_failure(dashboard: Dashboard) -> Handler:
    async def handler(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        texts = {"heading": "The dashboard failed", "detail": "", "advice": "Its log names the cause; report it."}
        return dashboard.render(request, None, "error.html", http_status=500, **texts)

    return handler
