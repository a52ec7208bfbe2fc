"""`outstation` commands run in the process of the test: a process of its own takes half a second to start."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from pathlib import Path
from typing import Any

from outstation.__main__ import main


def call_outstation(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one `outstation` command to its end; return its exit code and output. Not for threads: stdout is replaced."""
    out, err = io.BytesIO(), io.BytesIO()
    stdout, stderr = (io.TextIOWrapper(file, encoding="utf-8", write_through=True) for file in (out, err))
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main(list(arguments))
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue().decode(), err.getvalue().decode())


def audit_fleet(home: Path) -> tuple[int, Any]:
    """Run `fleet audit --json` in the fleet's folder; return its exit code and report."""
    done = call_outstation("fleet", "audit", "--json", "--dir", str(home))
    return done.returncode, json.loads(done.stdout)
