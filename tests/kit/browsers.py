"""Chromium for tests of pages, and the accessibility checks of axe-core."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
_AXE = "axe-core@4.11"
_RUN_AXE = """
    async rules => (await axe.run(document, {resultTypes: ['violations'], ...rules})).violations
        .map(v => ({id: v.id, impact: v.impact, help: v.help, nodes: v.nodes.map(n => n.html.slice(0, 200))}))"""


def launched() -> Iterator[Any]:
    """Yield a browser; skip the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip("chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def fetch_axe(folder: Path) -> str:
    """Return the source of axe-core from npm; skip the test without npm or network."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed; it brings axe-core")
    done = subprocess.run([npm, "pack", "--silent", _AXE], cwd=folder, capture_output=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip("axe-core cannot be fetched from npm")
    with tarfile.open(next(folder.glob("axe-core-*.tgz"))) as archive:
        source = archive.extractfile("package/axe.min.js")
        assert source is not None
        return source.read().decode()


def check_accessibility(page: Any, axe: str, *rules: str) -> list[dict[str, Any]]:
    """Return the serious and critical findings of axe-core in a page, by all its rules or by those named."""
    # Outside the page's own policy, which forbids inline scripts.
    session = page.context.new_cdp_session(page)
    session.send("Page.setBypassCSP", {"enabled": True})
    page.evaluate(axe)
    violations: list[dict[str, Any]] = page.evaluate(_RUN_AXE, {"runOnly": list(rules)} if rules else {})
    return [finding for finding in violations if finding["impact"] in ("serious", "critical")]
