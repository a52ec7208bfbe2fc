"""Page *audit*: when everything was verified last and how, what is missing, what was refused, and the evidence."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from outstation.fleet import config as fleet_config
from outstation.fleet.audit.checkpoint import Checkpoint, CheckpointFolder
from outstation.fleet.dashboard.pages.visit import Visit
from outstation.fleet.database.dashboard import messages
from outstation.fleet.database.interface import Connection
from outstation.foundation import clock
from outstation.foundation.errors import OutstationError
from outstation.protocol.wire.keys import SigningKey

_LISTED = 100
# A larger fleet's folder takes longer than a browser waits.
MAX_EVIDENCE_MESSAGES = 200_000
_TIMEOUT_S = 300.0
_MAKING = asyncio.Lock()


async def show(visit: Visit) -> Response:
    def load(db: Connection) -> dict[str, Any]:
        return {
            "totals": messages.load_totals(db),
            "missing": messages.count_missing(db),
            "gaps": messages.load_gaps(db, None, _LISTED),
            "refusals": messages.load_refusals(db, _LISTED),
        }

    loaded = await visit.dashboard.reader.read(load)
    checkpoint, problem = await visit.dashboard.reader.run_aside(lambda _: _load_checkpoint(visit))
    stored = max(0, loaded["totals"][1] - sum(loaded["missing"].values()))
    return visit.render(
        "audit.html",
        title="Audit",
        watch="*",
        checkpoint=checkpoint,
        checkpoint_problem=problem,
        stored=stored,
        since=max(0, stored - checkpoint.messages) if checkpoint else stored,
        can_make=visit.can_act,
        is_small=stored <= MAX_EVIDENCE_MESSAGES,
        listed=_LISTED,
        **loaded,
    )


async def evidence(visit: Visit) -> Response:
    """Make an evidence folder, as `outstation fleet evidence` does, and send it as a zip archive."""
    visit.require("operator")
    if visit.dashboard.desk is None:
        raise HTTPException(403, "this dashboard was not given the operator's key, which signs the evidence")
    _, total, _ = await visit.dashboard.reader.read(messages.load_totals)
    if total > MAX_EVIDENCE_MESSAGES:
        raise HTTPException(409, "this fleet is too large for a download: outstation fleet evidence --out DIR")
    if _MAKING.locked():
        raise HTTPException(503, "evidence is being made already; try again in a minute")
    async with _MAKING:
        archive = await _make_archive(visit, visit.dashboard.desk.key)
    await visit.record("evidence", visit.dashboard.fleet, "downloaded")
    day = clock.now_rfc3339()[:10]
    name = f"evidence-{visit.dashboard.fleet}-{day}.zip"
    return FileResponse(archive, media_type="application/zip", filename=name, background=BackgroundTask(archive.unlink))


async def _make_archive(visit: Visit, key: SigningKey) -> Path:
    """Return a zip archive with the folder, made by a process of its own, which needs much memory for a moment."""
    with tempfile.TemporaryDirectory(prefix="outstation-evidence-") as made:
        out = Path(made) / "evidence"
        options = evidence_options(out, visit.dashboard.folder, visit.dashboard.reader.location)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "outstation", "fleet", "evidence", *options,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            _, errors = await asyncio.wait_for(process.communicate(key.pem), _TIMEOUT_S)
        except TimeoutError:
            raise HTTPException(503, "making the evidence took too long: outstation fleet evidence --out DIR") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        # Exit 1 with a folder: the audit failed, and the folder says so. A killed process may leave part of one.
        if process.returncode not in (0, 1) or not out.is_dir():
            reason = errors.decode(errors="replace").strip().splitlines()
            ended = f"its process ended with status {process.returncode}"
            raise HTTPException(409, f"the evidence was not made: {reason[-1] if reason else ended}")
        return await asyncio.to_thread(_zip_folder, out)


def evidence_options(out: Path, folder: Path, location: str) -> list[str]:
    """Return the options of `fleet evidence`. Every user of this machine sees them: no password of fleet.toml.

    The key that this process was given is read from standard input.
    """
    options = ["--out", str(out), "--dir", str(folder), "--operator-key", "-"]
    is_configured = location == str(fleet_config.load(folder).fleet.db)
    return options if is_configured else [*options, "--db", location]


def _zip_folder(folder: Path) -> Path:
    with tempfile.NamedTemporaryFile(prefix="outstation-evidence-", suffix=".zip", delete=False) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    archive.write(path, f"evidence/{path.relative_to(folder)}")
        return Path(file.name)


def _load_checkpoint(visit: Visit) -> tuple[Checkpoint | None, str]:
    """Return the last audit's signed checkpoint, and why it cannot be believed."""
    try:
        config = fleet_config.load(visit.dashboard.folder)
        folder = CheckpointFolder(
            visit.dashboard.folder / "audit", config.fleet.name, fleet_config.load_trusted_keys(config)
        )
        return folder.read_signed(), ""
    except OutstationError as error:
        return None, str(error)
