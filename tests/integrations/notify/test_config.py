"""Section [notify]: every wrong value is named with its key and its fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from outstation.foundation.config.toml_files import Section, read
from outstation.foundation.errors import ConfigError
from outstation.integrations.notify.config import EmailTarget, NotifyConfig, WebhookTarget, check_notify

GOOD = """
[notify]
time_zone = "Europe/Berlin"
quiet_hours = "22:00-07:00"
[notify.targets.ops]
kind = "webhook"
url = "https://hooks.example.org/T0/abc"
secret_file = "webhook.secret"
[notify.targets.mail]
kind = "email"
host = "mail.example.org"
from = "fleet@example.org"
to = ["eva@example.org"]
username = "fleet"
password_file = "mail.password"
[notify.targets.chat]
kind = "apprise"
url_file = "chat.url"
[notify.targets.screen]
kind = "mqtt"
topic = "notify/acme"
[[notify.routes]]
targets = ["ops", "mail"]
severity = "critical"
[[notify.routes]]
targets = ["mail"]
delivery = "digest"
devices = ["pi-*"]
remind_every = "12 h"
"""


class File(Section, frozen=True):
    notify: NotifyConfig = NotifyConfig()


def load(folder: Path, text: str) -> NotifyConfig:
    path = folder / "fleet.toml"
    path.write_text(text, encoding="utf-8")
    config = read(path, File).notify
    check_notify(str(path), config)
    return config.with_absolute_paths(folder)


def test_a_whole_section_is_read_with_absolute_paths(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    ops, mail = config.targets["ops"], config.targets["mail"]
    assert isinstance(ops, WebhookTarget)
    assert isinstance(mail, EmailTarget)
    assert ops.secret_file == str(tmp_path / "webhook.secret")
    assert (mail.effective_port, mail.password_file) == (587, str(tmp_path / "mail.password"))
    assert [len(route.targets) for route in config.effective_routes()] == [2, 1]
    assert not NotifyConfig().is_on


def test_without_routes_every_target_is_notified_of_warnings(tmp_path: Path) -> None:
    [route] = load(tmp_path, GOOD[: GOOD.index("[[notify")]).effective_routes()
    assert (route.targets, route.severity) == (["ops", "mail", "chat"], "warning")


@pytest.mark.parametrize(
    ("old", "new", "key", "problem"),
    [
        ('"https://hooks.example.org/T0/abc"', '"http://hooks.example.org/"', "targets.ops.url", "not encrypted"),
        ('"https://hooks.example.org/T0/abc"', '"https://u:p@hooks.example.org/"', "targets.ops.url", "credentials"),
        ('"https://hooks.example.org/T0/abc"', '"ftp://x/"', "targets.ops.url", "is not https://"),
        ('"https://hooks.example.org/T0/abc"', '"https://x/a\\nb"', "targets.ops.url", "is not https://"),
        ('"eva@example.org"', '"eva@example.org\\nBcc: x"', "targets.mail.to", "is not an address"),
        ('username = "fleet"\n', "", "targets.mail.username", "belong together"),
        ('kind = "email"', 'kind = "email"\nsecurity = "none"', "targets.mail.security", "not encrypted"),
        ('topic = "notify/acme"', 'topic = "outstation/acme/x"', "targets.screen.topic", "outstation/"),
        ('targets = ["mail"]', 'targets = ["mial"]', "routes[1].targets", "did you mean 'mail'"),
        ('targets = ["mail"]', 'targets = ["screen"]', "routes[1].targets", "which no route selects"),
        ("22:00-07:00", "22-7", "quiet_hours", "must be like '22:00-07:00'"),
        ("22:00-07:00", "22:00-22:00", "quiet_hours", "whole day"),
        ("22:00-07:00", "25:00-07:00", "quiet_hours", "must be like"),
        ("Europe/Berlin", "Europe/Nowhere", "time_zone", "no time zone"),
        ('"12 h"', '"2 s"', "routes[1].remind_every", "at least 5 min"),
        ('kind = "mqtt"', 'kind = "mqqt"', "targets", "mqtt"),
        ('host = "mail', 'hots = "mail', "targets", "unknown key"),
        ("[notify.targets.ops]", '[notify.targets."O p"]', "targets.O p", "a name has"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(tmp_path: Path, old: str, new: str, key: str, problem: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, GOOD.replace(old, new))
    assert f"notify.{key}" in str(raised.value)
    assert problem in str(raised.value)
    assert "u:p@" not in str(raised.value)
