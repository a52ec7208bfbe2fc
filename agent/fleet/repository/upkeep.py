"""What the collector does for the repository: the timestamp each day, and an alert while something is to be done."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

from agent.errors import StorageError
from agent.fleet.database.projection import REPOSITORY, repository_alert
from agent.fleet.database.store import FleetStore
from agent.fleet.repository import expiry, refresh, status

logger = logging.getLogger(__name__)


def keep(folder: Path, store: FleetStore, at: datetime | None = None) -> None:
    """Raises StorageBusy where another command writes, StorageError for a file that is not ours to use.

    The next time comes soon.
    """
    try:
        _keep(folder, store, at or expiry.now())
    except OSError as error:
        raise StorageError(
            f"{error.filename or folder}: {error.strerror}, so the repository was not looked after; see who owns the "
            "file and its folder: the collector must be able to read and replace them"
        ) from error


def _keep(folder: Path, store: FleetStore, at: datetime) -> None:
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
