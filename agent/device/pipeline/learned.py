"""What is said of a site's reference when its drift windows are gathered: that it was learned, or why not."""

from __future__ import annotations

from typing import Any

from agent.clock import Now
from agent.device.store.message_log import Author
from agent.device.store.transaction import Transaction
from agent.drift.baseline.reference import Reference
from agent.drift.state import Verdict

# The id of the open alert that learning was refused.
REFUSED = "learning refused"


def tell(task: str, author: Author, tx: Transaction, verdict: Verdict, now: Now) -> None:
    """With the drift window that ended the gathering; nothing for any other."""
    if verdict.learned is not None:
        _learned(task, author, tx, verdict.learned, verdict.rows[1], now)
    if verdict.refused is not None:
        body = {"event": "not learned", "summary": f"{task}: {verdict.refused}", "evidence": {"task": task}}
        author.write(tx, "audit", None, body, now)
        _refused(task, author, tx, verdict.refused, now)


def _learned(task: str, author: Author, tx: Transaction, reference: Reference, through: int, now: Now) -> None:
    summary = f"{task}: learned this site's reference from {reference.drift_windows} drift windows."
    evidence: dict[str, Any] = {"task": task, "site": reference.digest, "through": through}
    if reference.site is not None:
        evidence |= reference.site.told()
    if reference.warning is not None:
        summary += f" Warning: {reference.warning}."
        evidence["warning"] = reference.warning
    author.write(tx, "audit", None, {"event": "learned", "summary": summary, "evidence": evidence}, now)
    if (identity := tx.kept(task, REFUSED)) is not None:
        text = f"{task}: this site's reference is learned, and drift is told against it."
        author.write(tx, "alerts", task, _alert("cleared", identity.decode(), text), now)
        tx.drop(task, REFUSED)


def _refused(task: str, author: Author, tx: Transaction, why: str, now: Now) -> None:
    identity = tx.kept(task, REFUSED)
    if identity is None:
        tx.count(f"learning refused.{task}", 1)
        identity = f"{task}/reference/model/{tx.counter(f'learning refused.{task}')}".encode()
        tx.keep(task, REFUSED, identity)
    text = f"{task}: no reference of this site yet, so that drift is not told: {why}."
    author.write(tx, "alerts", task, _alert("raised", identity.decode(), text), now)


def _alert(state: str, identity: str, summary: str) -> dict[str, Any]:
    return {
        "alert": "model",
        "subject": "reference",
        "state": state,
        "severity": "info",
        "id": identity,
        "summary": summary,
        "evidence": {},
    }
