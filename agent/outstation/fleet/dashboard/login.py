"""Signing in: the form, the check of a password, and where a visitor without a session is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from urllib.parse import quote

from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from outstation.fleet.dashboard.pages.visit import Dashboard, read_form
from outstation.fleet.dashboard.security.access import Visitor, record
from outstation.fleet.dashboard.security.passwords import verify_password
from outstation.fleet.database.dashboard import accounts

Endpoint = Callable[[Request], Awaitable[Response]]
_MAX_TARGET = 2000


def show_form(dashboard: Dashboard) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        target = _local_path(request.query_params.get("next", "/"))
        return dashboard.render(request, None, "login.html", next=target, error="", name="")

    return endpoint


def sign_in(dashboard: Dashboard) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        form = await read_form(request)
        name, target = form.get("name", "")[:64].lower(), _local_path(form.get("next", "/"))
        address, limits = request.client.host if request.client else "", dashboard.login_limits

        def refuse(status: int, error: str) -> Response:
            return dashboard.render(
                request, None, "login.html", http_status=status, next=target, error=error, name=name
            )

        wait_s = limits.wait_s(address, name)
        if wait_s:
            return refuse(429, f"Too many failed sign-ins; try again in {round(wait_s / 60) + 1} minutes.")
        # Counted before the password is checked: requests at the same time must not pass together.
        limits.add_failure(address, name)
        account = await dashboard.reader.read(lambda db: accounts.load_user(db, name))
        stored = account[1] if account else None
        async with dashboard.password_turn:
            fits = await asyncio.to_thread(verify_password, form.get("password", ""), stored)
        if account is None or not fits:
            await dashboard.reader.write(lambda db: record(db, None, accounts.SIGN_IN, name, "refused", address))
            return refuse(401, "Name or password is wrong.")
        limits.forget(address, name)
        cookie = await dashboard.access.sign_in(name, address)
        visitor = Visitor(name, account[0], "session", address)
        await dashboard.reader.write(lambda db: record(db, visitor, accounts.SIGN_IN, name, "done", address))
        response = RedirectResponse(target, 303)
        dashboard.access.set_cookie(response, cookie)
        return response

    return endpoint


def ask(request: Request) -> Response:
    """Return what a visitor without a session gets for a page. Raises HTTPException for a form."""
    if request.method == "POST":
        raise HTTPException(401, "your session has ended; sign in and repeat the action")
    if request.headers.get("sec-fetch-site") == "cross-site" and "again" not in request.query_params:
        # A link in a mail brings no SameSite=Strict cookie; a page of this site that opens itself again does.
        target = request.url.include_query_params(again=1)
        again = f"{target.path}?{target.query}"
        page = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0;url={}"><title>…</title>'
        return HTMLResponse(Markup(page).format(again))
    target = request.url.remove_query_params("again")
    wanted = target.path + (f"?{target.query}" if target.query else "")
    return RedirectResponse(f"/login?next={quote(wanted, safe='')}", 303)


def _local_path(text: str) -> str:
    """Return a path of this site; "/" for anything that a browser could take for another one."""
    is_path = text.startswith("/") and not text.startswith("//") and "\\" not in text
    return text if is_path and text.isprintable() and len(text) < _MAX_TARGET else "/"
