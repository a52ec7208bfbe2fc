"""What the collector does for the repository: the timestamp each day, and an alert while something is to be done."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

from agent.errors import StorageError
from agent.fleet.database.alerts import REPOSITORY_ALERT, repository_alert_row
from agent.fleet.database.store import FleetStore
from agent.fleet.repository import expiry, refresh, status

logger = logging.getLogger(__name__)


def maintain(folder: Path, store: FleetStore, current_time: datetime | None = None) -> None:
    """Raises StorageBusy where another command writes, StorageError for a file that is not ours to use.

    The next time comes soon.
    """
    try:
        _maintain(folder, store, current_time or expiry.now())
    except OSError as error:
        raise StorageError(
            f"{error.filename or folder}: {error.strerror}, so the repository was not looked after; see who owns the "
            "file and its folder: the collector must be able to read and replace them"
        ) from error


def _maintain(folder: Path, store: FleetStore, current_time: datetime) -> None:
    if refresh.refresh_daily(folder, current_time) is not None:
        logger.info("repository: the timestamp is signed anew")
    reminders = status.read(folder, current_time).reminders
    is_open = any(row["alert"] == REPOSITORY_ALERT for row in store.alerts())
    if bool(reminders) == is_open:
        return
    summary = "; ".join(reminders) or "Nothing in the repository expires soon, and no draft waits."
    logger.warning("repository: %s", summary)
    store.raise_alert(
        repository_alert_row(
            summary, f"{current_time:%Y-%m-%dT%H:%M:%S.000000Z}", int(current_time.timestamp()), raised=not is_open
        )
    )
