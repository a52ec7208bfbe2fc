"""Fleet repository after a killed command or a full disk: devices see the previous or the next edition."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from outstation.fleet.repository import expiry, key_rotation, mirror, repository_status, revoke, upkeep
from outstation.foundation.errors import StorageError, UsageError
from tests.kit.repositories import Client, Depot, served, version

pytest_plugins = ["tests.kit.repository_fixtures"]

ROOT = Path(__file__).parents[3]


class PowerCut(Exception):
    """The machine stops."""


# Action → (function, number of files it writes).
ACTIONS: dict[str, tuple[Callable[[Depot, Path], object], int]] = {
    "publish": (lambda depot, new: depot.publish(new), 4),
    "publish a first version": (lambda depot, new: depot.publish(new.with_name("other-1.0.0")), 7),
    "rotate targets": (lambda depot, new: key_rotation.rotate(depot.folder, "targets"), 7),
    "rotate timestamp": (lambda depot, new: key_rotation.rotate(depot.folder, "timestamp"), 5),
    "rotate tiny": (lambda depot, new: key_rotation.rotate(depot.folder, "tiny"), 6),
    "revoke": (lambda depot, new: revoke.revoke(depot.folder, "tiny", "1.0.0"), 3),
    "refresh": (lambda depot, new: upkeep.refresh(depot.folder, now=expiry.now() + timedelta(days=40)), 2),
}


def cut_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[str]:
    """Cut the power before (even steps) or right after (odd steps) a rename. Return the names of the files written."""
    real, renamed = os.replace, list[str]()

    def replace(source: Path, target: Path) -> None:
        if len(renamed) * 2 == step:
            raise PowerCut
        real(source, target)
        renamed.append(target.name)
        if len(renamed) * 2 - 1 == step:
            raise PowerCut

    monkeypatch.setattr(os, "replace", replace)
    return renamed


@pytest.mark.parametrize("name", ACTIONS)
def test_after_a_cut_at_any_write_devices_are_served(tmp_path: Path, made: Path, name: str) -> None:
    template = Depot(tmp_path / "before").create()
    first = template.publish(made)
    second = version(tmp_path, made, "1.1.0")
    version(tmp_path, made, "1.0.0", "other")
    prefix = {"publish": "tiny/1.1.0/", "publish a first version": "other/", "revoke": ""}.get(name, first.target)
    act, files = ACTIONS[name]
    with served(template.layout.home) as url:
        assert Client(tmp_path / "old", url, template.layout.root_path(1).read_bytes()).fetch_target(first.target)
    step, cut = 0, True
    while cut:
        depot = template.copy(tmp_path / f"cut-{step}")
        with served(depot.layout.home) as url:
            home = shutil.copytree(tmp_path / "old", tmp_path / f"old-{step}")
            client = Client(home, url, depot.layout.root_path(1).read_bytes())
            with pytest.MonkeyPatch.context() as patch:
                written = cut_at(patch, step)
                try:
                    act(depot, second)
                    cut = False
                except PowerCut:
                    pass
            fresh = Client(tmp_path / f"new-{step}", url, depot.layout.root_path(1).read_bytes())
            for device in (client, fresh):
                assert device.fetch_target(first.target) or (name == "revoke" and "timestamp.json" in written)
            if cut and not (name == "revoke" and "timestamp.json" in written):
                act(depot, second)
            listed = [held.target for held in repository_status.read(depot.folder).bundles]
            assert any(target.startswith(prefix) for target in listed) or not prefix
            for device in (client, fresh):
                assert [bool(device.fetch_target(target)) for target in listed] == [True] * len(listed)
            assert not depot.layout.draft.exists()
        step += 1
    assert step == 2 * files + 1


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_a_lost_key_is_replaced_after_a_cut_at_any_write(tmp_path: Path, made: Path, role: str) -> None:
    template = Depot(tmp_path / "before").create()
    done = template.publish(made)
    (template.layout.keys / f"{role}-1.key").unlink()
    step, cut = 0, True
    while cut:
        depot = template.copy(tmp_path / f"cut-{step}")
        with served(depot.layout.home) as url, pytest.MonkeyPatch.context() as patch:
            client = Client(tmp_path / f"device-{step}", url, depot.layout.root_path(1).read_bytes())
            cut_at(patch, step)
            try:
                key_rotation.rotate(depot.folder, role)
                cut = False
            except PowerCut:
                pass
            patch.undo()
            if cut:
                repository_status.read(depot.folder)
                key_rotation.rotate(depot.folder, role)
            assert client.fetch_target(done.target)
        step += 1
    # Private and public key, draft, role, referring roles, root; before and after each.
    assert step == 2 * {"targets": 7, "snapshot": 6, "timestamp": 5}[role] + 1


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 5, 6, 7])
def test_killed_at_any_write_of_a_publish_devices_see_an_edition(
    tmp_path: Path, depot: Depot, client: Client, made: Path, step: int
) -> None:
    first = depot.publish(made)
    second = version(tmp_path, made, "1.1.0")
    code = f"""
import os, signal
from pathlib import Path
from outstation.fleet.repository.publish import publish
from scripts.kit.bundles import KEY
real, n = os.replace, 0
def replace(source, target):
    global n
    if n * 2 == {step}: os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
    n += 1
    if n * 2 - 1 == {step}: os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
publish(Path({str(depot.folder)!r}), Path({str(second)!r}), [KEY.public], run_probe=False)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert client.fetch_target(first.target)
    done = depot.publish(second)
    assert done.is_new is (step < 7)
    assert client.fetch_target(done.target)


def test_an_interrupted_creation_is_completed(tmp_path: Path) -> None:
    step, cut = 0, True
    while cut:
        depot = Depot(tmp_path / str(step))
        with pytest.MonkeyPatch.context() as patch:
            cut_at(patch, step)
            try:
                depot.create(roots=2)
                cut = False
            except PowerCut:
                pass
        if depot.layout.newest_root_path() is None:
            depot.create(roots=2)
        assert repository_status.read(depot.folder).ok
        assert len(list(depot.layout.keys.glob("*.key"))) == 5
        step += 1
    # Two files for each of five keys, and one for each of four roles; before and after each.
    assert step == 2 * (2 * 5 + 4) + 1


def test_a_full_disk_changes_nothing(
    tmp_path: Path, depot: Depot, client: Client, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    def publish_on_full_disk(bundle: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises((StorageError, UsageError), match="No space left on device"):
                depot.publish(bundle)
        client.fetch_target()
        assert not list(depot.layout.home.rglob("*.new"))

    publish_on_full_disk(made)
    assert client.fetch_target(depot.publish(made).target)
    publish_on_full_disk(version(tmp_path, made, "1.1.0"))
    assert client.fetch_target(depot.publish(tmp_path / "tiny-1.1.0").target)


def test_an_interrupted_copy_holds_a_complete_edition(tmp_path: Path, made: Path) -> None:
    depot, old = Depot(tmp_path / "fleet").create(), tmp_path / "old"
    first = depot.publish(made)
    mirror.copy(depot.folder, old)
    second = depot.publish(version(tmp_path, made, "1.1.0"))
    step, cut = 0, True
    while cut:
        stick = tmp_path / f"stick-{step}"
        shutil.copytree(old, stick)
        with pytest.MonkeyPatch.context() as patch:
            cut_at(patch, step)
            try:
                mirror.copy(depot.folder, stick)
                cut = False
            except PowerCut:
                pass
        with served(stick / "repository") as url:
            client = Client(tmp_path / f"device-{step}", url, depot.layout.root_path(1).read_bytes())
            assert client.fetch_target(first.target)
            mirror.copy(depot.folder, stick)
            assert client.fetch_target(second.target)
        step += 1
    # Archive, role of the bundle, snapshot, timestamp.
    assert step == 2 * 4 + 1
