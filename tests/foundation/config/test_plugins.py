"""Plug-ins: names of other packages are found by their entry points, and a bad package ends with a clear error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from outstation.device.config import config
from outstation.device.config.sources import SourceSection
from outstation.fleet import config as fleet_config
from outstation.foundation.errors import ConfigError
from outstation.integrations.notify import sending
from outstation.integrations.notify.delivery import SendFailed
from outstation.integrations.notify.message import compose_test
from tests.kit.commands import call_outstation
from tests.kit.plugins import install_module

SOURCE = """
from outstation.device.config.sources import SourceSection

class Config(SourceSection, frozen=True, tag="dice"):
    sides: int = 6
"""
TARGET = """
from outstation.integrations.notify.config import TargetSection

class Config(TargetSection, frozen=True, tag="pager"):
    number: str
    code_file: str | None = None
    ca_file: str | None = None

sent = []

def check(target):
    return f"pager {target.number}"

def send(target, message):
    if target.number == "0":
        raise ZeroDivisionError("no such number")
    sent.append((target.number, message.subject))
"""
DEVICE = """
[device]
id = "pi-07"
fleet = "acme"
[streams.a]
fields = [{ name = "x" }]
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a package with one module and one entry point."""
    before = set(sys.modules)

    def install_package(group: str, name: str, text: str, package: str = "outside") -> None:
        folder = tmp_path / package
        install_module(folder, package, text, f"outstation.{group}", name)
        monkeypatch.syspath_prepend(str(folder))

    yield install_package
    for name in ("outside", "another"):
        if name not in before:
            sys.modules.pop(name, None)


def load(tmp_path: Path, text: str) -> config.Config:
    file = tmp_path / "outstation.toml"
    file.write_text(DEVICE + text)
    return config.load(file)


def test_a_source_of_another_package_has_its_own_section(install: Install, tmp_path: Path) -> None:
    install("sources", "dice", SOURCE)
    source: SourceSection = load(tmp_path, 'source = { kind = "dice", sides = 20 }').streams["a"].source
    assert (source.kind, msgspec.structs.asdict(source)) == ("dice", {"sides": 20})


@pytest.mark.parametrize(
    ("line", "key", "problem"),
    [
        ('source = { kind = "dise" }', "source.kind", "'dise' is not a valid choice; did you mean 'dice'?"),
        ('source = { kind = "q" }', "source.kind", "other packages can add some, see docs/guides/plugins.md"),
        ('source = { kind = "dice", side = 2 }', "source.side", "unknown key; did you mean 'sides'?"),
        ('source = { kind = "dice", sides = "six" }', "source.sides", "must be a whole number, not a text"),
    ],
)
def test_a_wrong_section_names_file_key_and_fix(
    install: Install, tmp_path: Path, line: str, key: str, problem: str
) -> None:
    install("sources", "dice", SOURCE)
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, line)
    assert raised.value.key == f"streams.a.{key}"
    assert problem in raised.value.problem
    assert raised.value.file.endswith("outstation.toml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import nonsense_that_is_nowhere", "package outside 1.0 cannot be loaded: ModuleNotFoundError: No module"),
        ("1 / 0", "package outside 1.0 cannot be loaded: ZeroDivisionError"),
        ("x = 1", "has no class Config that is a SourceSection; see docs/guides/plugins.md"),
        (SOURCE.replace('tag="dice"', 'tag="die"'), "is 'die'; see docs/guides/plugins.md"),
    ],
)
def test_a_broken_package_is_named(install: Install, tmp_path: Path, text: str, problem: str) -> None:
    install("sources", "dice", text)
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, 'source = { kind = "dice" }')
    assert problem in raised.value.problem


def test_two_packages_with_one_name_are_both_named(install: Install, tmp_path: Path) -> None:
    install("sources", "dice", SOURCE)
    install("sources", "dice", SOURCE, package="another")
    with pytest.raises(ConfigError, match=r"in several packages: another 1\.0, outside 1\.0; uninstall all but one"):
        load(tmp_path, 'source = { kind = "dice" }')


@pytest.mark.attack("package index")
def test_no_package_replaces_a_shipped_kind(install: Install, tmp_path: Path) -> None:
    install("sources", "host", "raise SystemExit('taken over')")
    assert load(tmp_path, 'source = { kind = "host" }').streams["a"].source.kind == "host"


def test_a_target_of_another_package_is_checked_and_sent_to(install: Install, tmp_path: Path) -> None:
    install("targets", "pager", TARGET)
    home = tmp_path / "acme"
    assert call_outstation("fleet", "init", str(home), "--broker", "mqtt://localhost").returncode == 0
    with (home / "fleet.toml").open("a") as file:
        file.write("""
[notify.targets.second]
kind = "pager"
number = "112"
code_file = "code"
ca_file = "ca.pem"
[notify.targets.first]
kind = "mqtt"
topic = "lamp"
[notify.targets.third]
kind = "pager"
number = "0"
[[notify.routes]]
targets = ["second"]
""")
    (home / "code").write_text("1234")
    targets = fleet_config.load(home).notify.targets
    assert list(targets) == ["second", "first", "third"]
    assert targets["second"].secret_files == [home / "code"]
    assert sending.find_exposed_secret(targets["second"]) == home / "code"
    module = sending.load_module(targets["second"])
    assert module.check(targets["second"]) == "pager 112"
    message = compose_test("second", sender="collector", fleet="acme", now_s=0.0)
    sending.send(targets["second"], message)
    assert module.sent == [("112", message.subject)]  # type: ignore[attr-defined]
    with pytest.raises(SendFailed, match="ZeroDivisionError: no such number"):
        sending.send(targets["third"], message)
