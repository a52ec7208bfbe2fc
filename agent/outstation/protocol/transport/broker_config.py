"""Section [broker]: address, TLS files, credentials, and limits of a connection that is billed by the byte."""

import re
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

import msgspec

from outstation.foundation.config.quantities import Duration, Size
from outstation.foundation.config.toml_files import Section
from outstation.foundation.day_window import DAY_S, DayWindow
from outstation.foundation.errors import ConfigError
from outstation.foundation.text import mask_password

# Schemes of MQTT. A device may have other sinks, see `outstation.device.config.sinks`.
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
    inside. The collector and `outstation fleet devices watch` decompress it and store the JSON. Other subscribers must
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
    """Allow `mqtt://` to another machine: others on the network can read the messages, but not forge them."""
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


def check_broker(file: str, broker: BrokerConfig, key: str = "broker") -> None:
    """Check the URL and certificates. Raises ConfigError, also for unencrypted remote connections."""
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


_METERED = "broker.metered"
_MIN_BUDGET, _MAX_BUDGET = 100_000, 10**12
# A message must fit into the part of a day's budget that bulk may use.
_MIN_MESSAGES = 2
_MIN_AGE_S, _MAX_AGE_S = 3600.0, 365 * DAY_S


class MeteredConfig(Section, frozen=True):
    """Limits of a connection that is billed by the byte. The section may be empty.

    ```toml
    [broker.metered]
    budget = "5 MB"
    windows = ["01:00-05:00"]
    ```

    - Alerts, audit messages and health messages, then one an hour, go at once, before everything else. Results, drift
      windows and metrics are bulk. Bulk may use 80 % of the budget, and waits for a window.
    - When the whole budget is used up, the device disconnects: being connected costs bytes, too. No message is lost.
    - Bytes are those of the network: the kernel counts TCP/IP headers, TLS, repetitions and acknowledgements. Name
      look-ups and failed attempts without an answer are not counted. The pings of an idle connection take 60 kB a day.
    - 24 h are hours that the device was on, by the boot-time clock: neither a restart nor a clock that is set gives a
      second budget.
    - While the clock is not set, nobody knows when a window opens. Bulk then goes in the first part of each 24 h of
      uptime, as long as all windows together.
    - Given up are `results`, `shadow`, `samples` and `health` messages. Each is declared to the collector in a signed
      audit message, event `evicted` with reason `expired`, and counted. The log stays complete, and `fleet audit`
      passes. Their age is counted in uptime.
    - `outstation status`, health messages (member `metered`) and `outstation check` show what was used, and what holds
      bulk back. `check` warns if the messages of a day take more than the budget.
    """

    budget: Size | None = None
    """Bytes within 24 h, both ways, such as `"5 MB"`; at least two messages of `max_message_bytes`."""
    windows: Annotated[list[str], msgspec.Meta(max_length=24)] = msgspec.field(default_factory=list)
    """Times of the local day when bulk may be sent, such as `["01:00-05:00"]`; without any, at all times."""
    max_age: Duration | None = None
    """Bulk that waited this long is given up, such as `"7 d"`; without it, everything waits."""

    @property
    def day_windows(self) -> list[DayWindow]:
        """Windows for bulk; none where it may be sent at any time. Raises ValueError."""
        return [DayWindow.parse(text) for text in self.windows]


class UplinkBrokerConfig(BrokerConfig, frozen=True):
    metered: MeteredConfig | None = None
    """Limits of a connection that is billed by the byte, see [broker.metered](#brokermetered)."""


def check_metered(file: str, broker: UplinkBrokerConfig) -> None:
    """Check the limits. Raises ConfigError."""
    metered = broker.metered
    if metered is None:
        return
    try:
        _ = metered.day_windows
    except ValueError as problem:
        raise ConfigError(file, f"{_METERED}.windows", f"{problem}; omit it to send at any time") from None
    least = max(_MIN_BUDGET, _MIN_MESSAGES * broker.max_message_bytes)
    if metered.budget is not None and not least <= metered.budget <= _MAX_BUDGET:
        raise ConfigError(
            file,
            f"{_METERED}.budget",
            f"must be between {least:,} B ({_MIN_MESSAGES} messages of max_message_bytes) and 1000 GB a day; omit it "
            "for no limit",
        )
    if metered.max_age is not None and not _MIN_AGE_S <= metered.max_age <= _MAX_AGE_S:
        raise ConfigError(file, f"{_METERED}.max_age", "must be between 1 h and 365 d; omit it to keep everything")
