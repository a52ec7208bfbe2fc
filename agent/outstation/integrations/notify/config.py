"""Section [notify]: who is notified of which alerts, over which target, when, and how often."""

import re
from collections.abc import Mapping
from datetime import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace

from outstation.foundation.config.plugins import PluginGroup
from outstation.foundation.config.quantities import Duration
from outstation.foundation.config.toml_files import Section, did_you_mean
from outstation.foundation.errors import ConfigError
from outstation.protocol.transport.broker_config import BrokerConfig, check_broker, check_no_password

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

# File of a device, beside the store, with the notifications that its targets got.
DATABASE = "notify.db"
MAX_TARGETS = 16
MIN_REMINDER_S = 300.0
_CERTIFICATES = {"ca_file", "cert_file"}
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_ADDRESS = r"[^\s@<>,;:\"()\[\]\\]{1,64}@[A-Za-z0-9.-]{1,255}"
_TIME = r"\d\d:\d\d"
_SPAN = r"(\d\d:\d\d)-(\d\d:\d\d)"

Names = Annotated[list[str], msgspec.Meta(max_length=64)]


class TargetSection(Section, frozen=True, tag_field="kind"):
    """Base of all targets. A key that ends in `_file` names a file; all but certificates hold a secret."""

    @property
    def kind(self) -> str:
        return str(self.__struct_config__.tag)

    @property
    def secret_files(self) -> list[Path]:
        files = (getattr(self, name) for name in self._file_keys() if name not in _CERTIFICATES)
        return [Path(file) for file in files if file is not None]

    def check(self, file: str, key: str) -> None:
        """Raise ConfigError if a value is wrong. Files are read when they are used."""

    def with_absolute_paths(self, base: Path) -> Self:
        """Return the section with its relative paths resolved from `base`."""
        files = {name: getattr(self, name) for name in self._file_keys()}
        return replace(self, **{name: str(base / file) for name, file in files.items() if file is not None})

    def _file_keys(self) -> list[str]:
        return [name for name in self.__struct_fields__ if name.endswith("_file")]


class WebhookTarget(TargetSection, frozen=True, tag="webhook"):
    """JSON document by HTTP POST.

    ```toml
    [notify.targets.office]
    kind = "webhook"
    url = "https://example.org/alerts"
    secret_file = "office.secret"
    ```
    """

    url: str
    """Where the JSON document is posted."""
    secret_file: str | None = None
    """File with the shared secret of the signature; without one it is not signed."""
    ca_file: str | None = None
    """CA of the server's certificate; without it the system's CAs are used."""
    allow_plaintext: bool = False
    """Allow `http://` to another machine."""

    def check(self, file: str, key: str) -> None:
        """Raise ConfigError for a URL that cannot be used, or that is not encrypted and leaves this machine."""
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
        except ValueError:
            usable = False
        check_no_password(file, f"{key}.url", self.url, "sign with secret_file instead")
        if not usable or not self.url.isprintable() or " " in self.url or not self.url.isascii():
            raise ConfigError(file, f"{key}.url", "is not https://HOST[:PORT]/PATH in ASCII")
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK and not self.allow_plaintext:
            raise ConfigError(file, f"{key}.url", "is not encrypted; use https://, or set allow_plaintext = true")


class EmailTarget(TargetSection, frozen=True, tag="email"):
    """Mail by SMTP.

    ```toml
    [notify.targets.me]
    kind = "email"
    host = "mail.example.org"
    from = "pi-07@example.org"
    to = ["me@example.org"]
    username = "pi-07"
    password_file = "mail.password"
    ```
    """

    host: str
    """Mail server."""
    sender: str = msgspec.field(name="from")
    """Address of the sender."""
    to: Annotated[list[str], msgspec.Meta(min_length=1, max_length=20)]
    """Addresses, up to 20."""
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
    """Port of the server; without it 587 for STARTTLS, 465 for TLS, 25 for neither."""
    security: Literal["starttls", "tls", "none"] = "starttls"
    """Encryption: STARTTLS, TLS from the start, or none, on this machine."""
    username: str | None = None
    """User name, with `password_file`."""
    password_file: str | None = None
    """File with the password."""
    ca_file: str | None = None
    """CA of the server's certificate."""
    allow_plaintext: bool = False
    """Allow `security = "none"` to another machine."""

    @property
    def effective_port(self) -> int:
        return self.port or {"starttls": 587, "tls": 465, "none": 25}[self.security]

    def check(self, file: str, key: str) -> None:
        for name, addresses in (("from", [self.sender]), ("to", self.to)):
            for address in addresses:
                if not re.fullmatch(_ADDRESS, address):
                    raise ConfigError(file, f"{key}.{name}", f"{address!r} is not an address like eva@example.org")
        if not re.fullmatch(r"[A-Za-z0-9.:-]{1,255}", self.host):
            raise ConfigError(file, f"{key}.host", f"{self.host!r} is not the name of a host")
        if (self.username is None) != (self.password_file is None):
            raise ConfigError(file, f"{key}.username", "username and password_file belong together; set both")
        if self.security == "none" and self.host not in _LOOPBACK and not self.allow_plaintext:
            problem = 'is not encrypted; use "starttls" or "tls", or set allow_plaintext = true'
            raise ConfigError(file, f"{key}.security", problem)


class AppriseTarget(TargetSection, frozen=True, tag="apprise"):
    """One of the services that Apprise knows.

    ```toml
    [notify.targets.phone]
    kind = "apprise"
    url_file = "phone.url"
    ```
    """

    url_file: str
    """File with one URL of Apprise, which holds credentials."""


class MqttTarget(TargetSection, frozen=True, tag="mqtt"):
    """Retained document with all open alerts.

    ```toml
    [notify.targets.lamp]
    kind = "mqtt"
    topic = "house/alerts"
    ```
    """

    topic: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    """Topic of the retained document with all open alerts, outside `outstation/`."""
    broker: BrokerConfig = msgspec.field(default_factory=BrokerConfig)
    """Keys of [broker](#broker)."""

    def check(self, file: str, key: str) -> None:
        check_broker(file, self.broker, f"{key}.broker")
        if any(character in self.topic for character in "+#\0") or self.topic.split("/")[0] in ("outstation", ""):
            problem = "has no wildcard, no empty first level, and does not begin with outstation/, where devices write"
            raise ConfigError(file, f"{key}.topic", problem)

    def with_absolute_paths(self, base: Path) -> Self:
        return replace(self, broker=self.broker.with_absolute_paths(base))


_MODULES = {kind: f"outstation.integrations.notify.{kind}" for kind in ("webhook", "email", "apprise", "mqtt")}
TARGETS = PluginGroup("outstation.targets", _MODULES, TargetSection)
Target = WebhookTarget | EmailTarget | AppriseTarget | MqttTarget


class NotifyRoute(Section, frozen=True):
    """Route of alerts to targets: those of at least `severity`, and matching an entry of each list that is given.

    ```toml
    [notify.targets.phone]
    kind = "apprise"
    url_file = "phone.url"

    [[notify.routes]]
    targets = ["phone"]
    severity = "critical"
    kinds = ["fault/*"]
    quiet_hours = false
    ```
    """

    targets: Annotated[list[str], msgspec.Meta(min_length=1, max_length=MAX_TARGETS)]
    """Names of targets."""
    severity: Literal["info", "warning", "critical"] = "warning"
    """Least severity."""
    devices: Names = msgspec.field(default_factory=list)
    """Patterns of device ids; without any, all."""
    groups: Names = msgspec.field(default_factory=list)
    """Patterns of `[device] groups`."""
    kinds: Names = msgspec.field(default_factory=list)
    """Patterns of `alert` or `alert/subject`, such as `"fault/a*"`."""
    delivery: Literal["now", "digest"] = "now"
    """At once, or in the digest of the day."""
    quiet_hours: bool = True
    """Obey the quiet hours."""
    recovery: bool = True
    """Tell that an alert was cleared, too."""
    remind_every: Duration | None = None
    """In place of that of `[notify]`."""


class NotifyConfig(Section, frozen=True):
    """Notifications about alerts: whom, when, and how often.

    ```toml
    [notify]
    time_zone = "Europe/Berlin"
    quiet_hours = "22:00-07:00"

    [notify.targets.me]
    kind = "email"
    host = "mail.example.org"
    from = "pi-07@example.org"
    to = ["me@example.org"]

    [[notify.routes]]
    targets = ["me"]
    severity = "critical"
    ```

    Tells people of this device's alerts, where there is no collector that does; the fleet has the same section in
    fleet.toml. See [notify.md](../guides/notify.md).
    """

    targets: dict[str, Target] = msgspec.field(default_factory=dict)
    """Whom to tell: tables `[notify.targets.NAME]`, whose `kind` chooses one of the targets below, or one of
    [another package](../guides/plugins.md)."""
    routes: Annotated[list[NotifyRoute], msgspec.Meta(max_length=64)] = msgspec.field(default_factory=list)
    """Which alerts go to which target, see [notify.routes](#notifyroutes); without one, warnings and critical alerts go
    to every target."""
    time_zone: str = "UTC"
    """Zone of quiet hours, digests and times in messages, such as `"Europe/Berlin"`."""
    quiet_hours: str | None = None
    """Only critical alerts are told then: `"22:00-07:00"`."""
    digest_at: str = "08:00"
    """When the digest of the day goes out."""
    group_for: Duration = Duration(30.0)
    """A target gets at most one notification in this time; what comes meanwhile is joined."""
    remind_every: Duration = Duration(86_400.0)
    """Reminder of an open alert that nobody acknowledged; `"0 s"` for none."""

    @property
    def secret_files(self) -> list[Path]:
        """Files that hold a secret of a target."""
        return [file for target in self.targets.values() for file in target.secret_files]

    @property
    def is_on(self) -> bool:
        return bool(self.targets)

    @property
    def zone(self) -> "ZoneInfo":
        # A device without [notify] needs no time zones.
        from zoneinfo import ZoneInfo

        return ZoneInfo(self.time_zone)

    @property
    def quiet_span(self) -> tuple[time, time] | None:
        """Beginning and end of the quiet hours, which may be on the next day."""
        match = re.fullmatch(_SPAN, self.quiet_hours) if self.quiet_hours else None
        return None if match is None else (time.fromisoformat(match[1]), time.fromisoformat(match[2]))

    def effective_routes(self) -> list[NotifyRoute]:
        named = [name for name, target in self.targets.items() if not isinstance(target, MqttTarget)]
        return self.routes or ([NotifyRoute(targets=named)] if named else [])

    def with_absolute_paths(self, base: Path) -> "NotifyConfig":
        return replace(self, targets={name: target.with_absolute_paths(base) for name, target in self.targets.items()})


def check_notify(file: str, config: NotifyConfig) -> None:
    """Check names, times and addresses. Raises ConfigError."""
    if len(config.targets) > MAX_TARGETS:
        raise ConfigError(file, "notify.targets", f"are more than {MAX_TARGETS}; Apprise sends one message to many")
    for name, target in config.targets.items():
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,31}", name):
            raise ConfigError(file, f"notify.targets.{name}", "a name has 1-32 of a-z 0-9 _ -")
        target.check(file, f"notify.targets.{name}")
    for i, route in enumerate(config.routes):
        for name in route.targets:
            if name not in config.targets:
                hint = did_you_mean(name, config.targets)
                raise ConfigError(file, f"notify.routes[{i}].targets", f"unknown target {name!r}{hint}")
            if isinstance(config.targets[name], MqttTarget):
                problem = f"{name!r} is a retained document of all open alerts, which no route selects; remove it here"
                raise ConfigError(file, f"notify.routes[{i}].targets", problem)
    if config.is_on:
        _check_times(file, config)


def _check_times(file: str, config: NotifyConfig) -> None:
    try:
        _ = config.zone
    # ZoneInfoNotFoundError is a KeyError.
    except (KeyError, ValueError, OSError):
        problem = f"{config.time_zone!r} is no time zone of this machine, such as Europe/Berlin or UTC"
        raise ConfigError(file, "notify.time_zone", problem) from None
    for key, example, pattern in (
        ("quiet_hours", "22:00-07:00", _SPAN),
        ("digest_at", "08:00", _TIME),
    ):
        text = getattr(config, key)
        if text is None:
            continue
        try:
            if not re.fullmatch(pattern, text):
                raise ValueError
            spans = [time.fromisoformat(part) for part in text.split("-")]
        except ValueError:
            raise ConfigError(file, f"notify.{key}", f"{text!r} must be like {example!r}") from None
        if len(spans) == 2 and spans[0] == spans[1]:
            raise ConfigError(file, f"notify.{key}", f"{text!r} is the whole day; remove it, or name two times")
    if not 1 <= config.group_for <= 3600:
        raise ConfigError(file, "notify.group_for", "must be between 1 s and 1 h")
    reminders: Mapping[str, Duration | None] = {
        "notify.remind_every": config.remind_every,
        **{f"notify.routes[{i}].remind_every": route.remind_every for i, route in enumerate(config.routes)},
    }
    for key, value in reminders.items():
        if value is not None and 0 < value < MIN_REMINDER_S:
            raise ConfigError(file, key, 'must be "0 s" for none, or at least 5 min')
