"""Fleet configuration, `fleet.toml`: keys, broker, database and repository of a fleet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace

from outstation.fleet.bridge_config import BRIDGES, BridgeSection
from outstation.fleet.collector.quota import Quota
from outstation.fleet.database.interface import MAX_PARTITIONS, is_postgresql
from outstation.fleet.database.maintenance.retention import MIN_RETENTION_S, Retention
from outstation.foundation.config.toml_files import Section, read
from outstation.foundation.errors import ConfigError, UsageError
from outstation.foundation.names import check_name
from outstation.foundation.text import mask_password
from outstation.integrations.homeassistant import config as homeassistant
from outstation.integrations.homeassistant.config import HomeAssistantConfig
from outstation.integrations.notify.config import TARGETS, NotifyConfig, check_notify
from outstation.integrations.sparkplug import config as sparkplug
from outstation.integrations.sparkplug.config import SparkplugConfig
from outstation.protocol.transport.broker_config import BrokerConfig, check_broker
from outstation.protocol.wire import keys
from outstation.protocol.wire.keys import PublicKey

FILE = "fleet.toml"
SYSTEM_FOLDER = Path("/var/lib/outstation-fleet")


class Fleet(Section, frozen=True):
    """Name of the fleet, and its database.

    ```toml
    [fleet]
    name = "acme"
    db = "postgresql://outstation@db.example.org/fleet"
    partitions = 8
    tasks = ["exercise"]
    ```
    """

    name: str
    """Name of the fleet; it is a level of every topic."""
    db: str = "fleet.db"
    """Database: a path, `sqlite:///PATH` or `postgresql://…`."""
    partitions: int = 1
    """Partitions of the tables; it applies when PostgreSQL tables are created."""
    tasks: Annotated[list[str], msgspec.Meta(max_length=64)] = msgspec.field(default_factory=list)
    """The only tasks whose messages the broker takes, any without. It bounds what a hostile device can let the broker
    retain."""
    share_group: Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z_-]{0,64}\Z")] = ""
    """Secret name of the shared subscriptions; the broker's access rules name it, too."""


class Identity(Section, frozen=True):
    """Signing key of a role, and its TLS certificate if the broker requires one."""

    key_file: str
    """Private signing key."""
    cert_file: str | None = None
    """Client certificate for the broker."""
    tls_key_file: str | None = None
    """Private key of the client certificate."""


class ClientCertificate(Section, frozen=True):
    """TLS certificate of a client that signs nothing."""

    cert_file: str
    """Client certificate for the broker."""
    tls_key_file: str
    """Private key of the client certificate."""


class SigningIdentity(Identity, frozen=True):
    """Signing key of a role whose former signatures stay valid, and its TLS certificate."""

    former_keys: tuple[str, ...] = ()
    """Public keys of the role before; the audit still accepts what they signed."""


class Authority(Section, frozen=True):
    """Certificate authority."""

    cert_file: str
    """Certificate of the authority."""
    key_file: str
    """Private key of the authority."""


class MetricsConfig(Section, frozen=True):
    """Metrics for [Prometheus](../guides/prometheus.md).

    ```toml
    [metrics]
    listen = "127.0.0.1:9464"
    ```
    """

    listen: str = ""
    """Address and port of the collector's `/metrics`; none without."""
    token_file: str | None = None
    """File with a bearer token of at least 32 characters, which also opens `/metrics` of the dashboard; needed where
    `listen` is reachable from other machines."""
    cert_file: str | None = None
    """Certificate, PEM: serve HTTPS, so that nobody reads the token on its way."""
    tls_key_file: str | None = None
    """Private key of the certificate."""


class Repository(Section, frozen=True):
    """Source of bundles for devices.

    ```toml
    [repository]
    url = "https://models.example.org/repository"
    ```
    """

    url: str
    """URL of `repository/` in the fleet's folder, or a folder on the devices."""


class FleetConfig(Section, frozen=True):
    """The whole file. Paths are absolute after `load`, `fleet.db` too if it is a file."""

    fleet: Fleet
    broker: BrokerConfig
    """The fleet's broker, with the collector's certificate.

    ```toml
    [broker]
    url = "mqtts://broker.example.org:8883"
    ca_file = "ca.pem"
    cert_file = "collector.crt"
    tls_key_file = "collector-tls.key"
    ```
    """
    collector: SigningIdentity
    """Signs acknowledgements, and statements of what `fleet db prune` removed.

    ```toml
    [collector]
    key_file = "collector.key"
    cert_file = "collector.crt"
    tls_key_file = "collector-tls.key"
    ```
    """
    operator: SigningIdentity
    """Signs rollout decisions, commands and checkpoints of audits.

    ```toml
    [operator]
    key_file = "operator.key"
    cert_file = "operator.crt"
    tls_key_file = "operator-tls.key"
    ```
    """
    commander: Identity | None = None
    """The operator's second certificate, for commands: with TLS the broker accepts one connection per certificate.

    ```toml
    [commander]
    key_file = "operator.key"
    cert_file = "commander.crt"
    tls_key_file = "commander-tls.key"
    ```
    """
    broker_admin: ClientCertificate | None = None
    """Changes the broker's access rules; absent if the broker is used without TLS.

    ```toml
    [broker_admin]
    cert_file = "broker-admin.crt"
    tls_key_file = "broker-admin-tls.key"
    ```
    """
    ca: Authority | None = None
    """The fleet's certificate authority; absent if the broker is used without TLS.

    ```toml
    [ca]
    cert_file = "ca.pem"
    key_file = "ca.key"
    ```
    """
    repository: Repository | None = None
    quota: Quota = Quota()
    metrics: MetricsConfig = MetricsConfig()
    homeassistant: HomeAssistantConfig | None = None
    sparkplug: SparkplugConfig | None = None
    bridges: dict[str, BridgeSection] = msgspec.field(default_factory=dict)
    """Bridges of [other packages](../guides/plugins.md), which have keys of their own."""
    retention: Retention = Retention()
    notify: NotifyConfig = NotifyConfig()

    @property
    def command_broker(self) -> BrokerConfig:
        """Return the broker's settings for commands and rollouts; `devices watch` uses the operator's connection."""
        return self.broker_for(self.commander or self.operator)

    @property
    def certificate_files(self) -> list[Path]:
        """Return the certificates of the authority and of the roles, without those of devices."""
        sections = (self.ca, self.collector, self.operator, self.commander, self.broker_admin)
        return [Path(section.cert_file) for section in sections if section is not None and section.cert_file]

    def list_bridges(self) -> list[tuple[str, str, HomeAssistantConfig | SparkplugConfig | BridgeSection]]:
        """Return section name, kind and section of each bridge that is switched on."""
        sections = {name: (name, getattr(self, name)) for name in ("homeassistant", "sparkplug")}
        sections |= {f"bridges.{name}": (section.kind, section) for name, section in self.bridges.items()}
        return [
            (name, kind, section)
            for name, (kind, section) in sections.items()
            if section is not None and getattr(section, "enabled", True)
        ]

    def broker_for(self, identity: Identity | ClientCertificate) -> BrokerConfig:
        """Return the broker's settings with the certificate of `identity`."""
        return replace(self.broker, cert_file=identity.cert_file, tls_key_file=identity.tls_key_file)


def find_folder(explicit: str | None) -> Path:
    """Return the first of: `explicit`, `$OUTSTATION_FLEET`, `.` if it has a fleet.toml, `/var/lib/outstation-fleet`."""
    if explicit or os.environ.get("OUTSTATION_FLEET"):
        return Path(explicit or os.environ["OUTSTATION_FLEET"])
    return Path() if Path(FILE).exists() else SYSTEM_FOLDER


_STRANGERS = {"device": "is a section of a device's outstation.toml; --dir names the folder of a fleet"}


def load(folder: Path) -> FleetConfig:
    """Read and check the config in `folder`. Raises ConfigError."""
    path = folder / FILE
    if not path.exists():
        problem = "no such file; `outstation fleet init DIR` creates a fleet, `--dir DIR` names another folder"
        raise ConfigError(str(path), "", problem)
    config = read(path, FleetConfig, strangers=_STRANGERS, plugins={"notify.targets.*": TARGETS, "bridges.*": BRIDGES})
    check_name(str(path), "fleet.name", config.fleet.name)
    for task in config.fleet.tasks:
        check_name(str(path), "fleet.tasks", task)
    check_broker(str(path), config.broker)
    check_notify(str(path), config.notify)
    if not 1 <= config.fleet.partitions <= MAX_PARTITIONS:
        raise ConfigError(str(path), "fleet.partitions", f"must be 1 to {MAX_PARTITIONS}")
    if config.fleet.partitions > 1 and not is_postgresql(config.fleet.db):
        problem = "needs a PostgreSQL database, but fleet.db names a file; remove it, or set fleet.db to postgresql://…"
        raise ConfigError(str(path), "fleet.partitions", problem)
    if config.quota.messages_per_s * config.quota.burst_s < 1:
        problem = f"no message ever passes: less than one in burst_s = {config.quota.burst_s:g}; raise one of both"
        raise ConfigError(str(path), "quota.messages_per_s", problem)
    if (config.metrics.cert_file is None) != (config.metrics.tls_key_file is None):
        problem = "cert_file and tls_key_file belong together; set both or neither"
        raise ConfigError(str(path), "metrics.cert_file", problem)
    _check_retention(str(path), config.retention)
    base = path.resolve().parent
    bridge = config.homeassistant
    if bridge is not None:
        homeassistant.check(str(path), bridge)
        if bridge.broker is None and config.broker.tls and bridge.prefix != homeassistant.DEFAULT_PREFIX:
            problem = f"the access rules of the fleet's broker name {homeassistant.DEFAULT_PREFIX!r}; remove the key"
            raise ConfigError(str(path), "homeassistant.prefix", problem)
        bridge = homeassistant.with_absolute_paths(bridge, base)
    node = config.sparkplug
    if node is not None:
        sparkplug.check(str(path), node, config.broker)
        node = sparkplug.with_absolute_paths(node, base)
    for name, section in config.bridges.items():
        section.check(str(path), f"bridges.{name}")
    bridges = {name: section.with_absolute_paths(base) for name, section in config.bridges.items()}

    def with_absolute_paths(section: Section) -> Section:
        files = {name: getattr(section, name) for name in section.__struct_fields__ if name.endswith("_file")}
        return replace(section, **{name: str(base / file) for name, file in files.items() if file is not None})

    sections = {
        name: getattr(config, name)
        for name in ("broker", "collector", "operator", "commander", "broker_admin", "ca", "metrics")
    }
    changed = {name: with_absolute_paths(section) for name, section in sections.items() if section is not None}
    fleet = replace(config.fleet, db=resolve_database(config.fleet.db, base))
    notify = config.notify.with_absolute_paths(base)
    return replace(config, fleet=fleet, homeassistant=bridge, sparkplug=node, bridges=bridges, notify=notify, **changed)


def resolve_database(url: str, base: Path) -> str:
    """Return the file that a path or `sqlite:///` URL names, or the `postgresql://` URL. Raises UsageError."""
    scheme = urlsplit(url).scheme if "://" in url else ""
    if is_postgresql(url):
        return url
    if scheme not in ("", "sqlite"):
        raise UsageError(f"{mask_password(url)}: unknown database; use a path, sqlite:///PATH or postgresql://…")
    path = url.removeprefix("sqlite:///") if scheme else url
    if not path or path.startswith("sqlite://"):
        raise UsageError(
            f"{mask_password(url)}: names no file; write sqlite:///fleet.db, or sqlite:////var/lib/fleet.db"
        )
    return str(base / path)


def _check_retention(file: str, retention: Retention) -> None:
    for name, seconds in msgspec.structs.asdict(retention).items():
        if seconds is not None and seconds < MIN_RETENTION_S:
            problem = "must be a day or more: rollouts and open alerts need the newest messages"
            raise ConfigError(file, f"retention.{name}", problem)
        if seconds is not None and retention.messages is not None and seconds > retention.messages:
            problem = "is longer than retention.messages, with which these rows go; shorten it, or keep messages longer"
            raise ConfigError(file, f"retention.{name}", problem)


def load_trusted_keys(config: FleetConfig) -> list[PublicKey]:
    """Return the operator's current and former public keys, from the fleet's folder rather than its database.

    Raises UsageError.
    """
    return _load_keys("operator", config.operator)


def load_collector_keys(config: FleetConfig) -> list[PublicKey]:
    """Return the collector's current and former public keys. Raises UsageError."""
    return _load_keys("collector", config.collector)


def _load_keys(role: str, identity: SigningIdentity) -> list[PublicKey]:
    trusted = [keys.load_public_for(Path(identity.key_file))]
    for i, text in enumerate(identity.former_keys):
        try:
            trusted.append(keys.parse_public_key(text))
        except ValueError as error:
            raise ConfigError(FILE, f"{role}.former_keys[{i}]", f"not a public key: {error}") from None
    return trusted
