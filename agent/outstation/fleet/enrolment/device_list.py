"""List of devices to enrol at once: CSV with a column `device`, and maybe `request` and `thumbprint`."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import msgspec

from outstation.foundation import input_files
from outstation.foundation.errors import UsageError
from outstation.foundation.names import is_name

MAX_DEVICES = 100_000
_COLUMNS = ("device", "request", "thumbprint")


class ListedDevice(msgspec.Struct, frozen=True):
    """One line: `request` is a file that `outstation request` wrote, `thumbprint` that of its key."""

    device: str
    request: Path | None
    thumbprint: str | None


def read(file: Path) -> list[ListedDevice]:
    """Read a list. Paths are relative to its folder. Raises UsageError that names the line."""
    try:
        rows = list(csv.reader(input_files.read_text(file).splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{file}: cannot be read as CSV: {error}") from None
    header = [name.strip() for name in rows[0]] if rows else []
    unknown = sorted({*header} - {*_COLUMNS})
    if "device" not in header or unknown or len({*header}) != len(header):
        problem = f"column {unknown[0]!r} is unknown" if unknown else "its first line names no column device"
        raise UsageError(f"{file}: {problem}; columns are {', '.join(_COLUMNS)}")
    listed: list[ListedDevice] = []
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        cells = dict(zip(header, (cell.strip() for cell in row), strict=False))
        device = cells.get("device", "")
        if len(row) > len(header) or not is_name(device):
            problem = "has more cells than columns" if len(row) > len(header) else f"{device!r} cannot name a device"
            raise UsageError(f"{file}:{number}: {problem}")
        request = cells.get("request")
        listed.append(ListedDevice(device, file.parent / request if request else None, cells.get("thumbprint") or None))
    counts = Counter(entry.device for entry in listed)
    if repeated := next((name for name, n in counts.items() if n > 1), None):
        raise UsageError(f"{file}: lists {repeated} twice; remove one of the lines")
    if not 0 < len(listed) <= MAX_DEVICES:
        raise UsageError(f"{file}: names {len(listed)} devices; a list has 1 to {MAX_DEVICES}")
    return listed
