"""Sections of `outstation.toml` on the device itself: its name, the keys it trusts, and the limits of its daemon."""

from typing import Annotated, Literal

import msgspec

from outstation.foundation.config.quantities import Duration, Size
from outstation.foundation.config.toml_files import Section
from outstation.foundation.errors import ConfigError
from outstation.foundation.input_files import DATA_DIR
from outstation.foundation.names import check_name
from outstation.protocol.transport.broker_config import parse_loopback

_MIN_STORE_BYTES = 2**20
MAX_RETENTION_S = 3650 * 86_400.0


class DeviceConfig(Section, frozen=True):
    """Name of the device, and its folder.

    ```toml
    [device]
    id = "pi-07"
    fleet = "acme"
    groups = ["roof", "south"]
    ```
    """

    id: str
    """Device id: a-z 0-9 - _ . , 1 to 64 characters; it is a level of every topic."""
    fleet: str
    """Fleet name, same characters."""
    data_dir: str = DATA_DIR
    """Folder of the store, the intake socket and installed bundles; on a local disk. If it is moved away, the daemon
    stops with exit code 3 and leaves a note `<data_dir>.moved` beside it, or `<data_dir>.moved/note` if that is a
    folder, as under the shipped unit. It starts again when the folder is back or the note is deleted. If the note
    cannot be written, the message says so."""
    groups: Annotated[list[str], msgspec.Meta(max_length=8)] = msgspec.field(default_factory=list)
    """Groups this device belongs to; a group's desired state applies, and the first listed group wins."""


class CollectorConfig(Section, frozen=True):
    """Keys of the collector, and whose confirmation deletes a message.

    ```toml
    [collector]
    delivery = "broker"                 # a device without a fleet
    ```
    """

    key: str = ""
    """The collector's public key; only acknowledgements signed with it count."""
    encryption_key: str = ""
    """The collectors' public X25519 key, for `[privacy] encrypt` and `[samples]`; the fleet's trust document may name a
    newer one."""
    delivery: Literal["collector", "broker"] = "collector"
    """Delete a message once the collector has acknowledged it; `"broker"`: once the broker has."""


class OperatorsConfig(Section, frozen=True):
    """Keys of people by role.

    ```toml
    [operators]
    keys = ["B6pMmUwGkLtISEqevNHqOIXPij3Pb8HgNhgs7UHL5S8"]
    wipe_delay = "24 h"
    ```

    The fleet's trust document replaces `keys`, `deployers`, `reporters` and `[collector] key` (see
    [keys](keys.md#keys-of-operators-and-collector)).
    """

    keys: list[str] = msgspec.field(default_factory=list)
    """Public keys of operators: they may sign all commands, desired state and bundles."""
    deployers: list[str] = msgspec.field(default_factory=list)
    """Public keys that may sign desired state, and the commands `rollback` and `report`."""
    reporters: list[str] = msgspec.field(default_factory=list)
    """Public keys that may sign the command `report`."""
    wipe_delay: Duration = Duration(3600.0)
    """A `wipe` that one operator's key confirms happens this much later; `"0 s"`: at once."""


class PublishersConfig(Section, frozen=True):
    """Keys that sign bundles.

    ```toml
    [publishers]
    keys = ["iELJoGOcScueykDd42222LBDL-IQOdcDBCZb5PXw2Tw"]
    ```
    """

    keys: list[str] = msgspec.field(default_factory=list)
    """Public keys that may sign bundles, besides the operators' and the built-in one."""


class BufferConfig(Section, frozen=True):
    """Limits of the store.

    ```toml
    [buffer]
    max_size = "8 GiB"
    commit_every = "10 s"               # a third of the flash wear of a 1 Hz sensor
    ```
    """

    max_size: Size = Size(2**30)
    """Limit of the store's size, never exceeded."""
    commit_every: Duration = Duration(1.0)
    """Longest time a producer waits for its acknowledgement; 128 KiB of rows are committed at once."""
    keep_readings: Duration = Duration(24 * 3600.0)
    """Retention of readings after all tasks have consumed them; shorter when space runs out."""
    keep_messages: Duration = Duration(48 * 3600.0)
    """Retention of acknowledged messages, in case the collector is restored from a backup; shorter when space runs
    out. The newest results messages of each task stay longer, for `outstation results`."""
    keep_results: Duration = Duration(7 * 86_400.0)
    """Retention of predictions for labels that arrive later."""
    when_full: Literal["evict", "refuse"] = "evict"
    """Delete the least important data and declare it; `"refuse"`: reject new readings."""
    journal: bool = True
    """Acknowledge commits of a few rows from a file of 64 KiB, written in place: a quarter of the flash wear of such
    commits. `false`: the database has each row at once, for a program that reads `outstation.db` itself."""


class PrivacyConfig(Section, frozen=True):
    """Limits of what leaves the device.

    ```toml
    [privacy]
    min_count = 20
    encrypt = true
    ```

    See [concepts/privacy.md](../concepts/privacy.md).

    What `encrypt = true` costs: nobody but the collectors, `outstation fleet devices watch` and the sender of a
    command can read what this device sends, also what is retained (`state`, `keys`). A sealed message has 58 bytes
    more inside and 176 bytes of properties less. Sealing takes 109 µs of an x86 core, signing 44 µs. The journal,
    `[collector] delivery` and resending do not change. Messages stay in the clear in the device's store, and in the
    collector's database.
    """

    min_count: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 10
    """Least number of readings that any number in a message rests on; a bundle can demand more, never less; `1`: no
    limit."""
    values_in_logs: bool = False
    """Name the value of a rejected reading in its reason, and so in journals."""
    encrypt: bool = False
    """Seal every message to the collectors' `[collector] encryption_key`: the broker and its other clients see topic,
    size and time only."""


class ThrottleConfig(Section, frozen=True):
    """Limits at which tasks slow down, then pause, to protect the machine.

    ```toml
    [throttle]
    slow_temperature = 60.0             # in a closed case without a fan
    max_temperature = 70.0
    min_battery = 40.0
    duty_cycle = 0.1
    ```
    """

    max_temperature: Annotated[float, msgspec.Meta(gt=0, le=150)] = 80.0
    """°C above which tasks pause."""
    min_battery: Annotated[float, msgspec.Meta(ge=0, le=95)] = 20.0
    """Battery percentage below which tasks pause while it discharges."""
    slow_temperature: Annotated[float, msgspec.Meta(gt=0, le=150)] = 75.0
    """°C above which tasks slow down; from `max_temperature` on they pause anyway."""
    slow_battery: Annotated[float, msgspec.Meta(ge=0, le=95)] = 30.0
    """Battery percentage below which tasks slow down while it discharges."""
    duty_cycle: Annotated[float, msgspec.Meta(ge=0.01, le=1)] = 0.25
    """Share of the time in which slowed tasks run: 0.25 rests three seconds after each second of work."""
    throttled: Literal["wait", "ignore"] = "wait"
    """Pause tasks while the firmware throttles the processor; or `"ignore"`."""
    nice: Annotated[int, msgspec.Meta(ge=0, le=19)] = 5
    """Niceness of the inference thread relative to intake and uplink, 0 to 19; the installed service has `Nice=5` and
    cannot change it."""


class ModelsConfig(Section, frozen=True):
    """Limits of model processes.

    ```toml
    [models]
    confinement = "required"
    memory = "200 MiB"
    ```

    A task's model runs in a process of its own, which tasks of the same bundle share. That process computes and
    answers; it has no files, network, keys or environment.
    """

    confinement: Literal["auto", "required", "off"] = "auto"
    """Confine model processes where the machine can (Linux seccomp and libseccomp2); `"required"`: run no model and
    decode no file elsewhere; `"off"`: run models in the daemon's own process."""
    memory: Size | None = None
    """Memory of a model process beyond what Python and the runtime take, half of the machine's unless given; a bundle's
    own limit counts if it is lower."""


class IntakeConfig(Section, frozen=True):
    """Further ways for producers to reach the intake.

    ```toml
    [intake]
    tcp = "127.0.0.1:7071"              # for a container without access to the socket
    ```
    """

    tcp: str | None = None
    """`"127.0.0.1:7071"`: also accept the socket protocol on this loopback address, from producers with the token."""
    token_file: str | None = None
    """File with the token of TCP producers, at least 32 characters, readable by its owner only;
    `<data_dir>/intake.token` unless given; the first start makes it."""


def check_device(file: str, device: DeviceConfig) -> None:
    """Check section [device]. Raises ConfigError."""
    check_name(file, "device.id", device.id)
    check_name(file, "device.fleet", device.fleet)
    for group in device.groups:
        check_name(file, "device.groups", group)


def check_buffer(file: str, buffer: BufferConfig) -> None:
    """Check section [buffer]. Raises ConfigError."""
    if buffer.max_size < _MIN_STORE_BYTES:
        raise ConfigError(file, "buffer.max_size", f"{buffer.max_size} bytes are too few; use at least 1 MiB")
    for key in ("keep_readings", "keep_messages", "keep_results"):
        if not 0.0 <= getattr(buffer, key) <= MAX_RETENTION_S:
            raise ConfigError(file, f"buffer.{key}", "must be between 0 s and 3650 d")


def check_intake(file: str, intake: IntakeConfig) -> None:
    """Check section [intake]. Raises ConfigError."""
    if intake.tcp is not None:
        try:
            parse_loopback(intake.tcp)
        except ValueError as problem:
            raise ConfigError(file, "intake.tcp", str(problem)) from None
