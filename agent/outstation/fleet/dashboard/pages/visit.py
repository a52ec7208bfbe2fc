"""A request of a known visitor, and what all pages share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from outstation.fleet.dashboard.pages import views
from outstation.fleet.dashboard.pages.desk import OperatorDesk
from outstation.fleet.dashboard.security.access import Access, AccessPolicy, Visitor, record
from outstation.fleet.dashboard.security.login_limits import LoginLimits
from outstation.fleet.dashboard.state.feed import ChangeFeed
from outstation.fleet.dashboard.state.fleet_state import FleetState
from outstation.fleet.dashboard.state.reader import DatabaseReader
from outstation.fleet.database.store import FleetStore
from outstation.foundation.errors import UsageError
from outstation.foundation.render.templates import Environment

Page = Callable[["Visit"], Awaitable[Response]]
# Renders the drift plot of (store, device, task, since, dark) as SVG. It needs bundles, which another layer reads.
DriftPlotter = Callable[[FleetStore, str, str, str | None, bool], str]
_MAX_FIELDS = 20


class Dashboard:
    """State and services of all pages. `desk` signs decisions; None if this process has no operator key."""

    def __init__(
        self,
        fleet: str,
        folder: Path,
        location: str,
        policy: AccessPolicy,
        desk: OperatorDesk | None,
        plot_drift: DriftPlotter,
    ) -> None:
        self.fleet, self.folder, self.desk, self.plot_drift = fleet, folder, desk, plot_drift
        self.reader = DatabaseReader(location)
        self.access = Access(policy, self.reader)
        self.state = FleetState()
        self.feed = ChangeFeed(self.reader, self.state)
        self.environment: Environment = views.create_environment()
        self.login_limits = LoginLimits(time.monotonic)
        # scrypt needs 16 MiB and a processor: one at a time.
        self.password_turn = asyncio.Semaphore(1)

    def render(
        self, request: Request, visitor: Visitor | None, template: str, *, http_status: int = 200, **values: Any
    ) -> Response:
        context = {
            "fleet": self.fleet,
            "visitor": visitor,
            "path": request.url.path,
            "problem": self.state.problem,
            "read_us": self.state.read_us,
            "watch": "",
            "has_desk": self.desk is not None,
            **values,
        }
        return HTMLResponse(self.environment.get_template(template).render(context), http_status)


class Visit(msgspec.Struct, frozen=True):
    dashboard: Dashboard
    request: Request
    visitor: Visitor

    def render(self, template: str, *, http_status: int = 200, **values: Any) -> Response:
        return self.dashboard.render(self.request, self.visitor, template, http_status=http_status, **values)

    @property
    def can_act(self) -> bool:
        """Return True if actions of an operator are offered."""
        return self.dashboard.desk is not None and self.visitor.may("operator")

    async def form(self) -> dict[str, str]:
        return await read_form(self.request)

    def require(self, role: str) -> None:
        """Raise HTTPException unless the visitor has the role."""
        if not self.visitor.may(role):
            raise HTTPException(403, f"this needs the role {role}; you are {self.visitor.role}")

    async def act(self, action: str, concerned: str, write: Callable[[FleetStore], str]) -> None:
        """Write with a store, and record who did it; `write` returns the outcome. Raises UsageError if refused."""
        try:
            outcome = await self.dashboard.reader.run_writer(write)
        except UsageError as error:
            await self.record(action, concerned, f"refused: {error}")
            raise
        await self.record(action, concerned, outcome)

    async def record(self, action: str, concerned: str, outcome: str) -> None:
        """Write who did what."""
        entry = (self.visitor, action, concerned, outcome, self.visitor.address)
        await self.dashboard.reader.write(lambda db: record(db, *entry))


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form. Raises HTTPException."""
    body = await request.body()
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=_MAX_FIELDS))
    except ValueError:
        raise HTTPException(400, "the form cannot be read") from None
