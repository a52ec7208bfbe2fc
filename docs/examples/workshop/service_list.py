"""Service list of a workshop: which machines need a technician, from the database of the fleet's collector.

python service_list.py acme/fleet.db
"""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path
from typing import NamedTuple

# A sensor that is wrong now; a machine that reports nothing.
QUERY = """
    SELECT device, alert, subject, summary FROM alerts a
    WHERE alert IN ('fault', 'connection') AND state = 'raised' AND NOT EXISTS (
        SELECT 1 FROM alerts later
        WHERE later.device = a.device AND later.log = a.log AND later.id = a.id AND later.seq > a.seq)
    ORDER BY device, alert, subject
"""


class Visit(NamedTuple):
    device: str
    task: str


def plan_visits(database: Path) -> list[Visit]:
    """Return what a technician has to do, one line for each machine and cause."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        rows = connection.execute(QUERY).fetchall()
    finally:
        connection.close()
    visits = []
    for device, alert, subject, _ in rows:
        task = f"replace the sensor of {subject}" if alert == "fault" else "look at power and network"
        visits.append(Visit(device, task))
    return sorted(set(visits))


if __name__ == "__main__":
    for visit in plan_visits(Path(sys.argv[1])):
        print(f"{visit.device}: {visit.task}")
