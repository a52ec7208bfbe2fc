"""Section [broker]: address, TLS files and credentials of an MQTT broker."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

import msgspec

from agent.errors import ConfigError
from agent.text import mask_password
from agent.toml_files import Section

# Schemes of MQTT. A device may have other sinks, see `agent.bootstrap.sinks`.
MQTT_SCHEMES = ("mqtt", "mqtts")
_FORM = "mqtt://HOST[:PORT] or mqtts://HOST[:PORT], with a port up to 65535"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class BrokerConfig(Section, frozen=True):
    """Broker that takes the messages.

    ```toml
    [broker]
    url = "mqtts://broker.example.org:8883"
    ca_file = "ca.pem"
    cert_file = "device.crt"
    tls_key_file = "device-tls.key"
    compress = true                     # the link is billed by the byte
    ```

    With `compress = true` the payload is gzip with content type `application/gzip`. The signature still covers the JSON
    inside. The collector and `outstation fleet watch` decompress it and store the JSON. Other subscribers must
    decompress it themselves: `mosquitto_sub … -N -C 1 | zcat`. Use it on links that are billed by the byte. `outstation
    cost` counts bytes before compression.
    """

    url: str = "mqtt://127.0.0.1:1883"
    """Broker address; use `mqtts://` for any other machine."""
    ca_file: str | None = None
    """CA that signed the broker's certificate; without it the system's CAs are used."""
    cert_file: str | None = None
    """Client certificate of this device."""
    tls_key_file: str | None = None
    """Private key of the client certificate."""
    username: str | None = None
    """User name, for brokers that require one."""
    password: str | None = None
    """Password, for brokers that require one."""
    allow_plaintext: bool = False
    """Allow `mqtt://` to another machine: anybody on the network can read the messages, but not forge them."""
    max_message_bytes: Annotated[int, msgspec.Meta(ge=2_000, le=1_000_000)] = 120_000
    """Largest message; longer ones are split. AWS IoT Core accepts 128 KiB."""
    compress: bool = False
    """Send logged messages as gzip, about a quarter of the bytes."""

    @property
    def shown_url(self) -> str:
        """URL for messages and logs."""
        return mask_password(self.url)

    @property
    def scheme(self) -> str:
        return self.url.partition(":")[0]

    @property
    def tls(self) -> bool:
        return self.url.startswith("mqtts:")

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or (8883 if self.tls else 1883)

    def with_absolute_paths(self, base: Path) -> Self:
        """Return the section with its file paths resolved against `base`."""
        given = {name: getattr(self, name) for name in ("ca_file", "cert_file", "tls_key_file")}
        files = {name: str(base / value) for name, value in given.items() if value is not None}
        return msgspec.structs.replace(self, **files)


def check_broker(
    file: str, broker: BrokerConfig, key: str = "broker", *, schemes: Collection[str] = MQTT_SCHEMES
) -> None:
    """Check the URL and certificates. Raises ConfigError, also for unencrypted remote connections.

    A sink with another scheme among `schemes` checks the rest of its URL itself.
    """
    if broker.scheme in schemes and broker.scheme not in MQTT_SCHEMES:
        return
    try:
        parts = urlsplit(broker.url)
        usable = parts.scheme in MQTT_SCHEMES and parts.hostname and (parts.port or 1) > 0
    except ValueError:
        usable = False
    check_no_password(file, f"{key}.url", broker.url, "set username and password in this section instead")
    if not usable:
        raise ConfigError(file, f"{key}.url", f"{broker.shown_url!r} is not {_FORM}")
    if not broker.tls and broker.host not in _LOOPBACK and not broker.allow_plaintext:
        raise ConfigError(
            file, f"{key}.url", f"{broker.shown_url} is not encrypted; use mqtts://, or set allow_plaintext = true"
        )
    if (broker.cert_file is None) != (broker.tls_key_file is None):
        raise ConfigError(file, f"{key}.cert_file", "cert_file and tls_key_file belong together; set both or neither")


def check_no_password(file: str, key: str, url: str, fix: str) -> None:
    """Check that a URL, which commands and logs show, holds no credentials. Raises ConfigError."""
    if (shown := mask_password(url)) != url:
        raise ConfigError(file, key, f"{shown} holds credentials, which would not be used; remove them: {fix}")


def parse_loopback(address: str) -> tuple[str, int]:
    """Parse a loopback address like `"127.0.0.1:7071"` to host and port. Raises ValueError for any other."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if host not in _LOOPBACK or not re.fullmatch(r"\d{1,5}", port, re.ASCII) or int(port) > 0xFFFF:
        raise ValueError(f'{address!r} must be a loopback address like "127.0.0.1:7071"')
    return host, int(port)
