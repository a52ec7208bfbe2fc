"""Page *roll-outs*: state, rules with their intervals, devices by phase, signed decisions, and what may be decided."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from outstation.fleet import config as fleet_config
from outstation.fleet.dashboard.pages import views
from outstation.fleet.dashboard.pages.desk import ROLLOUT_ACTIONS
from outstation.fleet.dashboard.pages.visit import Visit
from outstation.fleet.database import rollouts as statements
from outstation.fleet.database.interface import Connection
from outstation.fleet.database.store import FleetStore
from outstation.fleet.rollout import decisions, journal
from outstation.fleet.rollout.journal import Rollout
from outstation.fleet.rollout.rollout_status import build_status, load_snapshot
from outstation.fleet.rollout.tallies import RolloutTallies
from outstation.foundation import clock
from outstation.foundation.errors import UsageError
from outstation.foundation.render.charts import ForestRow, render_forest
from outstation.foundation.text import format_interval, format_value
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import PublicKey

_MAX_ROLLOUTS, _MAX_DEVICES = 4, 300
# A device that is not done comes first.
_PHASES = ("rejected", "rolled_back", "fetching", "shadow", "canary", "not_reported", "active", "cancelled")


class _Tallies:
    """Tallies of the roll-outs that are looked at: each page reads only the messages that are new to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], RolloutTallies] = OrderedDict()

    def load(self, db: Connection, rollout: Rollout, now_us: int) -> dict[str, Any]:
        with self._lock:
            tallies = self._known.pop((rollout.name, rollout.started), None) or RolloutTallies(rollout)
            status = build_status(db, load_snapshot(db, rollout, now_us, tallies), now_us)
            # Only after a complete reading, which a failure would leave half done.
            self._known[rollout.name, rollout.started] = tallies
            while len(self._known) > _MAX_ROLLOUTS:
                self._known.popitem(last=False)
            return status


_TALLIES = _Tallies()


async def show(visit: Visit) -> Response:
    listed = await visit.dashboard.reader.read(lambda db: [*reversed(journal.load_rollouts(db))])
    return visit.render("rollouts.html", title="Roll-outs", watch="rollouts", rollouts=listed)


async def show_one(visit: Visit) -> Response:
    name, now_us = visit.request.path_params["name"], clock.read().wall_us
    trusted = fleet_config.load_trusted_keys(fleet_config.load(visit.dashboard.folder))

    def load(db: Connection) -> dict[str, Any]:
        rollout = _find(db, name)
        rows = statements.load_decisions(db, name)
        return {
            "rollout": rollout,
            "status": _TALLIES.load(db, rollout, now_us),
            "decisions": _verify(name, rows, trusted),
        }

    loaded = await visit.dashboard.reader.read(load)
    status, order = loaded["status"], {phase: i for i, phase in enumerate(_PHASES)}
    status["devices"].sort(key=lambda device: (order.get(device["phase"], 3), device["device"]))
    return visit.render(
        "rollout.html",
        title=name,
        watch="*",
        charts={rule["rule"]: _draw_rule(rule) for rule in status["rules"] if rule["value"] is not None},
        actions=_offered(status) if visit.can_act else [],
        max_devices=_MAX_DEVICES,
        **loaded,
    )


async def decide(visit: Visit) -> Response:
    """Sign and publish a decision: pause, resume, promote or abort."""
    visit.require("operator")
    name, form = visit.request.path_params["name"], await visit.form()
    action, reason, desk = form.get("action", ""), form.get("reason", "").strip()[:400], visit.dashboard.desk
    if desk is None:
        raise HTTPException(403, "this dashboard was not given the operator's key, so it decides nothing")
    if action not in ROLLOUT_ACTIONS:
        raise HTTPException(400, "there is no such action")

    def run(store: FleetStore) -> str:
        with store.snapshot() as db:
            _find(db, name)
        return desk.decide(store, name, action, reason, visit.visitor.name)

    await visit.act(f"{action} roll-out", name, run)
    return RedirectResponse(f"/rollouts/{views.quote_path(name)}", 303)


def _find(db: Connection, name: str) -> Rollout:
    try:
        return journal.find(db, name)
    except UsageError:
        raise HTTPException(404, f"there is no roll-out {name[:64]!r}") from None


def _offered(status: dict[str, Any]) -> list[str]:
    return {"running": ["promote", "pause", "abort"], "paused": ["resume", "promote", "abort"]}.get(status["state"], [])


def _verify(rollout: str, rows: Sequence[Any], trusted: Sequence[PublicKey]) -> list[dict[str, Any]]:
    """Return the decisions, newest first, each with the problem of its signature or chain, "" if there is none."""
    signers = {key.kid: Signer("operator", key) for key in trusted}
    _, invalid = decisions.verify_chain(rollout, rows, signers.get)
    problems: dict[Any, str] = dict(invalid)
    return [
        {"n": n, "time": time, "event": event, "summary": summary, "problem": problems.get(n, ""), "jws": token}
        for _, n, time, event, summary, _, _, token in reversed(rows)
    ]


def _draw_rule(rule: dict[str, Any]) -> Markup:
    """Draw the value of a rule with its interval, and its limit as a line."""
    state = {"passed": "ok", "failed": "fault"}.get(rule["state"], "unknown")
    text = f"{format_value(rule['value'])} {format_interval(rule['low'], rule['high'])}".strip()
    row = ForestRow("", rule["value"], rule["low"], rule["high"], format_value(rule["value"]), state)
    # The drawing escapes every text in it.
    return Markup(render_forest(f"{rule['rule']}: {text}", [row], reference=rule["limit"]))
