"""Pages of accounts: the first page, signing out, and for administrators accounts, sessions and what was done."""

from __future__ import annotations

from typing import Any

from starlette.responses import RedirectResponse, Response

from outstation.fleet.dashboard.pages.visit import Visit
from outstation.fleet.dashboard.security import passwords
from outstation.fleet.database.dashboard import accounts
from outstation.fleet.database.interface import Connection
from outstation.foundation import clock

_MAX_ACTIONS = 200


async def home(visit: Visit) -> Response:
    return RedirectResponse("/fleet", 303)


async def logout(visit: Visit) -> Response:
    if visit.visitor.session:
        await visit.dashboard.access.sign_out(visit.visitor)
        await visit.record(accounts.SIGN_OUT, visit.visitor.name, "done")
    response = RedirectResponse("/login", 303)
    visit.dashboard.access.delete_cookie(response)
    return response


async def show(visit: Visit) -> Response:
    visit.require("admin")
    now = clock.now_rfc3339()

    def load(db: Connection) -> dict[str, Any]:
        return {
            "users": accounts.load_users(db),
            "sessions": accounts.count_sessions(db, now),
            "actions": accounts.load_actions(db, _MAX_ACTIONS),
        }

    return visit.render(
        "accounts.html", title="Accounts", roles=passwords.ROLES, **await visit.dashboard.reader.read(load)
    )


async def change(visit: Visit) -> Response:
    """Change the role of an account, end its sessions, or remove it. Only `fleet dashboard user` sets passwords."""
    visit.require("admin")
    form = await visit.form()
    name, action, role = form.get("name", ""), form.get("action", ""), form.get("role", "")
    now = clock.now_rfc3339()

    def run(db: Connection) -> str:
        known = accounts.load_user(db, name)
        if known is None:
            return "refused: there is no such account"
        if action == "role" and role in passwords.ROLES:
            accounts.save_user(db, name, role, known[1], now)
            # A session must not keep what its account lost.
            accounts.revoke_sessions(db, name, now)
            return f"role {role}"
        if action == "end":
            accounts.revoke_sessions(db, name, now)
            return "sessions ended"
        if action == "remove" and name != visit.visitor.name:
            accounts.delete_user(db, name, now)
            return "removed"
        return "refused"

    outcome = await visit.dashboard.reader.write(run)
    await visit.record("account", name, outcome)
    return RedirectResponse("/accounts", 303)
