"""What the collector does for the repository: the timestamp each day, and an alert while something is to be done."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

from agent.fleet.repository import expiry, refresh, status
from agent.fleet.store import FleetStore
from agent.fleet.unfold import REPOSITORY, repository_alert

logger = logging.getLogger(__name__)


def keep(folder: Path, store: FleetStore, at: datetime | None = None) -> None:
    """Raises StorageBusy where another command writes: the next time comes soon."""
    at = at or expiry.now()
    if refresh.refresh_daily(folder, at) is not None:
        logger.info("repository: the timestamp is signed anew")
    reminders = status.status(folder, at).reminders
    is_open = any(row["alert"] == REPOSITORY for row in store.alerts())
    if bool(reminders) == is_open:
        return
    summary = "; ".join(reminders) or "Nothing in the repository expires soon, and no draft waits."
    logger.warning("repository: %s", summary)
    store.raise_alert(
        repository_alert(summary, f"{at:%Y-%m-%dT%H:%M:%S.000000Z}", int(at.timestamp()), raised=not is_open)
    )
