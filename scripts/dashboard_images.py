"""Pictures of the dashboard for the documentation: a simulated fleet, a roll-out, and Chromium.

`python -m scripts.dashboard_images [FOLDER]` writes `dashboard-PAGE-KIND.png`, KIND being light, dark or phone.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from outstation.fleet import config as fleet_config
from outstation.fleet.audit import audit as audits
from outstation.fleet.audit.checkpoint import CheckpointFolder
from outstation.fleet.dashboard.pages.desk import OperatorDesk
from outstation.fleet.dashboard.security import passwords
from outstation.fleet.dashboard.security.access import AccessPolicy
from outstation.fleet.database.dashboard import accounts
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.rollout import actions
from outstation.fleet.rollout.actions import RolloutOperator
from outstation.fleet.rollout.plan import Promotion, RolloutPlan, RolloutStep
from outstation.foundation import clock
from outstation.protocol.wire import keys
from outstation.protocol.wire.desired_state import CanaryRules
from outstation.workbench.simulate import plan as planning
from outstation.workbench.simulate import scenario
from outstation.workbench.simulate.simulation import Simulation
from outstation.workbench.testing.messages import MODEL, NEW_MODEL, MessageSender, new_key
from scripts.kit.usage import answer_help
from tests.kit import browsers
from tests.kit.dashboards import PASSWORD, ROLES, ServedDashboard, health, running, wait_until_shown

IMAGES = Path(__file__).parents[1] / "docs" / "images"
KINDS = {"light": (1280, 860, "light"), "dark": (1280, 860, "dark"), "phone": (390, 844, "light")}
_MAX_BYTES = 150_000
_PARTNERS = 18


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="outstation-images-") as made:
        home = _simulate(Path(made))
        config = fleet_config.load(home)
        operator = keys.load_private(Path(config.operator.key_file))
        store = FleetStore(config.fleet.db)
        _audit(store, home, operator)
        _start_rollout(store, config.fleet.name, operator)
        desk = OperatorDesk(config, home, operator)
        with running(home, store, config.fleet.db, AccessPolicy(b"i" * 32, "admin"), desk) as dashboard:
            wait_until_shown(dashboard, "/fleet", "sensor fault")
            _work(dashboard)
            pages = _pages(dashboard)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=browsers.CHROMIUM, args=browsers.ARGUMENTS)
                for kind in KINDS:
                    take(browser, dashboard.url, pages, kind, folder)
                browser.close()
        store.close()


def _simulate(folder: Path) -> Path:
    plan = planning.demo_plan(6, 25.0, 0, scenario.from_name("exercise"))
    with Simulation(folder, plan) as fleet:
        fleet.start()
        for _ in fleet.watch_progress(time.monotonic() + 180):
            pass
        fleet.stop()
        return fleet.home


def _audit(store: FleetStore, home: Path, operator: keys.SigningKey) -> None:
    config = fleet_config.load(home)
    trusted = fleet_config.load_trusted_keys(config)
    (home / "audit").mkdir()
    checkpoints = CheckpointFolder(home / "audit", config.fleet.name, trusted)
    report, _ = audits.audit_from_checkpoint(store, checkpoints, operator, lambda _: None, trusted, 1, full=True)
    assert report.passed


def _start_rollout(store: FleetStore, fleet: str, operator: keys.SigningKey) -> None:
    """Start a roll-out, and let further devices report on it."""
    now_us = clock.read().wall_us
    senders = [MessageSender(device=f"site-{n:02}", key=new_key(1000 + n), task="sorting") for n in range(_PARTNERS)]
    now = clock.to_rfc3339(now_us)
    for sender in senders:
        store.enrol(sender.device, sender.key.public, replace=False, now=now)
    rules = Promotion(min_devices=5, min_batches=20, min_hours=24.0, min_agreement=0.9, max_latency_ratio=1.5)
    steps = [RolloutStep("shadow", 100.0, rules), RolloutStep("canary", 25.0, rules), RolloutStep("all", 100.0, rules)]
    bundle = (NEW_MODEL["name"], NEW_MODEL["version"], NEW_MODEL["digest"])
    plan = RolloutPlan("sorting-1-1", "sorting", *bundle, "all", None, steps, CanaryRules())
    with store.transaction() as db:
        actions.start(db, RolloutOperator(operator, fleet, now_us - 5 * 3_600_000_000), 1, plan)
    for n, sender in enumerate(senders):
        sent = [sender.results(), sender.drift(), health(sender, waiting=n % 4), sender.state()]
        if n == 3:
            sent.append(sender.rollout("rejected", "sorting-1-1", reason="golden_mismatch"))
        elif n < 15:
            sent.append(sender.rollout("shadow", "sorting-1-1"))
            sent += [sender.shadow("sorting-1-1", agreeing=93 + (n + i) % 6) for i in range(6)]
        arrivals: list[Any] = [Arrival(sender.verify(message)) for message in sent]
        store.ingest(arrivals, [], clock.now_rfc3339())


def _work(dashboard: ServedDashboard) -> None:
    """Create accounts, and let one of them acknowledge an incident and give verdicts on it and on results."""
    now, password = clock.now_rfc3339(), passwords.hash_password(PASSWORD)
    with dashboard.store.transaction() as db:
        for name, role in ROLES.items():
            accounts.save_user(db, name, role, password, now)
    ref = re.search(r"/incidents/[0-9a-f]{12}", dashboard.get("/incidents").text)
    assert ref is not None
    note = {"action": "acknowledge", "note": "The strap is loose; I go there at noon."}
    otto = dashboard.sign_in("otto")
    dashboard.post(ref[0], note, otto)
    dashboard.post(f"{ref[0]}/verdict", {"action": "right", "note": "The strap was loose."}, otto)
    rows = re.findall(r'name="row" value="(\d+)"', dashboard.get("/devices/pi-01?range=all", otto).text)
    for n, row in enumerate(dict.fromkeys(rows[:12])):
        correction = {"action": "correct", "label": "PEN", "note": "seen on the video"}
        verdict = correction if n == 2 else {"action": "confirm"}
        dashboard.post("/devices/pi-01/verdict", {"task": "exercise", "row": row, **verdict}, otto)


def _pages(dashboard: ServedDashboard) -> dict[str, str]:
    """Return the path of each page by its name."""
    incidents = dashboard.get("/incidents").text
    ref = re.search(r"/incidents/[0-9a-f]{12}", incidents)
    message = re.search(r"/messages/[^\"]+", incidents)
    assert ref is not None
    assert message is not None
    return {
        "fleet": "/fleet",
        "incidents": "/incidents",
        "incident": ref[0],
        "device": "/devices/pi-01?range=all",
        "labels": "/labels?task=exercise",
        "tasks": "/tasks",
        "task": "/tasks/exercise",
        "models": "/models",
        "model": f"/models/{MODEL['name']}",
        "rollouts": "/rollouts",
        "rollout": "/rollouts/sorting-1-1",
        "audit": "/audit",
        "message": message[0],
        "accounts": "/accounts",
        "login": "/login",
    }


def take(browser: Browser, url: str, pages: dict[str, str], kind: str, folder: Path) -> None:
    width, height, scheme = KINDS[kind]
    size: Any = {"width": width, "height": height}
    context = browser.new_context(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
    tab = context.new_page()
    for name, path in pages.items():
        tab.goto(url + path)
        tab.wait_for_timeout(900)
        # The first two screens say what a page is.
        tab.set_viewport_size({"width": width, "height": min(2 * height, tab.evaluate("document.body.scrollHeight"))})
        tab.wait_for_timeout(200)
        data = tab.screenshot()
        (folder / f"dashboard-{name}-{kind}.png").write_bytes(_compress(data))
        tab.set_viewport_size(size)
    context.close()


def _compress(data: bytes) -> bytes:
    """Return a picture with a palette, which has a third of the bytes."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    for colors in (256, 192, 128, 64):
        out = io.BytesIO()
        picture.quantize(colors, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
        if len(out.getvalue()) <= _MAX_BYTES:
            break
    return out.getvalue()


def _folder(arguments: Sequence[str]) -> Path:
    folder = Path(arguments[0]) if arguments else IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    answer_help(__doc__)
    main(_folder(sys.argv[1:]))
