"""Composition root of a device's store and keys: from the config file to an open store and message log."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

import msgspec

from outstation.device import config
from outstation.device.bootstrap import credentials
from outstation.device.commands import erasure
from outstation.device.config import Config
from outstation.device.config.stream_privacy import StreamPrivacy
from outstation.device.config.tasks import NO_TASK
from outstation.device.machine import secret_file
from outstation.device.machine.keys import KeyFiles, open_keys
from outstation.device.machine.timekeeping import make_clock
from outstation.device.recovery import open
from outstation.device.recovery.replaced_secret import report_replaced_secret
from outstation.device.recovery.report_findings import report_findings
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import DATABASE, Store
from outstation.foundation import input_files
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import StorageError, UsageError
from outstation.foundation.owner import become_owner
from outstation.protocol.wire import keys
from outstation.protocol.wire.privacy import field_privacy
from outstation.protocol.wire.privacy.field_privacy import FieldPrivacy

KEY_FILE = "device.key"
TLS_KEY_FILE = "device-tls.key"


def load_config(config_file: str | None, task: str | None = None) -> tuple[Path, Config]:
    """Return the config file in use and its contents. Raises ConfigError, UsageError if it has no `task`."""
    file = input_files.find_config(config_file)
    conf = config.load(file)
    if conf.broker.tls_key_file is not None:
        tls_key_file = str(credentials.find_secret(Path(conf.broker.tls_key_file)))
        conf = msgspec.structs.replace(conf, broker=msgspec.structs.replace(conf.broker, tls_key_file=tls_key_file))
    become_owner(conf.data_dir)
    if task is not None and task not in conf.tasks:
        raise UsageError(f"{file}: there is no task {task!r}{did_you_mean(task, conf.tasks, NO_TASK)}")
    return file, conf


def open_store(conf: Config) -> Store:
    """Open the device's store for writing. Raises StorageError, UsageError."""
    erasure.require_unwiped(conf.data_dir)
    store = open.open_store(conf.data_dir, max_size=int(conf.buffer.max_size), with_journal=conf.buffer.journal)
    try:
        store.bind_device(conf.device.fleet, conf.device.id)
        store.declare_streams(conf.streams)
    except BaseException:
        store.close()
        raise
    return store


def open_store_read_only(conf: Config) -> Store:
    """Open the device's store beside a daemon that writes. Raises StorageError, and UsageError if there is none yet."""
    erasure.require_unwiped(conf.data_dir)
    try:
        return Store.open_read_only(conf.data_dir, max_size=int(conf.buffer.max_size))
    except StorageError:
        if _may_exist(conf.data_dir / DATABASE):
            raise
        raise UsageError(f"{conf.data_dir}: no store here yet; start `outstation run`, or ingest something") from None


def _may_exist(path: Path) -> bool:
    """Return True if the file exists, or if a missing permission hides whether it does."""
    try:
        path.stat()
    except OSError as error:
        return not isinstance(error, FileNotFoundError)
    return True


def device_key_path(file: Path, conf: Config) -> Path:
    """Return the path of the device's first key: a credential, beside the config file, or in the data folder.

    Raises UsageError.
    """
    own = file.resolve().parent / KEY_FILE
    for path in (credentials.find_secret(own), own, conf.data_dir / KEY_FILE):
        if path.exists():
            return path
    if (sealed := credentials.sealed_path(own)).exists():
        raise UsageError(f"{own}: no device key; only the service can open {sealed} (docs/guides/encryption.md)")
    raise UsageError(
        f"{own}: no device key; restore it from a backup. `outstation init` makes another one, with which a fleet must "
        "enrol the device again"
    )


def load_key_files(file: Path, conf: Config) -> KeyFiles:
    """Load the device's signing keys. Raises UsageError."""
    return KeyFiles(conf.data_dir, keys.load_private(device_key_path(file, conf)))


def open_message_log(file: Path, conf: Config, store: Store) -> MessageLog:
    """Open the message log, and report in it what opening the store found."""
    key, live_key = open_keys(store, load_key_files(file, conf))
    broker, is_new = conf.broker, store.acknowledged().through == 0
    is_lost = not is_new and not (conf.data_dir / secret_file.COMMITMENT_SECRET.name).exists()
    secret = secret_file.load_commitment_secret(conf.data_dir, is_new=is_new)
    message_log = MessageLog(
        *(conf.device.fleet, conf.device.id, key, store.log_id, store.boot),
        *(broker.max_message_bytes, live_key, broker.compress),
        *(secret, conf.privacy.min_count),
        privacy=build_privacy(conf, secret),
    )
    if broker.metered is not None:
        from outstation.device.uplink.meter import MAX_URGENT, URGENT_KINDS

        message_log.urgent_kinds, message_log.max_urgent = URGENT_KINDS, MAX_URGENT
    tasks: dict[str, list[str]] = {}
    for name, task in conf.tasks.items():
        tasks.setdefault(task.stream, []).append(name)
    # Before anything else is written to this log or sent from it.
    now = make_clock(store)()
    report_findings(store, message_log, tasks, now)
    report_replaced_secret(store, message_log, now, is_lost=is_lost)
    return message_log


def build_privacy(conf: Config, secret: bytes) -> dict[str, FieldPrivacy]:
    """Return what may leave about each task: the strictest rules of its stream and of those that it joins.

    Keys of hashes are derived from the device's secret.
    """
    if all(stream.privacy == StreamPrivacy() for stream in conf.streams.values()):
        return {}
    # Of all streams: messages about the device know by their fields which ones are not computed.
    rules = {
        name: FieldPrivacy(
            fields=frozenset(field.name for field in stream.fields),
            private=stream.privacy.private_fields([field.name for field in stream.fields]),
            steps=stream.privacy.round,
            hashed=frozenset(stream.privacy.hash),
            kinds=None if stream.privacy.messages is None else frozenset(stream.privacy.messages),
            min_count=stream.privacy.min_count,
            min_results=stream.privacy.min_results,
            key=hmac.digest(secret, f"outstation categories v1\n{name}".encode(), "sha256"),
            period_s=float(stream.privacy.hash_period),
        )
        for name, stream in conf.streams.items()
    }
    return {
        name: field_privacy.merge_strictest(rules[task.stream], [rules[each.stream] for each in task.inputs.values()])
        for name, task in conf.tasks.items()
    }


def erase(file: Path, conf: Config, device_key_file: Path) -> dict[str, Any]:
    """Erase the device's data, keys and installation files, with the store closed; return the wipe marker's members."""
    own = file.resolve().parent / KEY_FILE
    own_keys = [device_key_file, keys.public_key_path(device_key_file)]
    if device_key_file == credentials.find_secret(own) != own:
        # systemd holds a credential in memory; what is on the disk is its encrypted file.
        own_keys = [credentials.sealed_path(own), keys.public_key_path(own)]
    own_keys += conf.notify.secret_files
    return erasure.erase(conf.data_dir, erasure.installation_files(file, conf), own_keys)
