"""Joining a fleet: files of an enrolment are put beside those of the device, whose store then moves into the fleet.

Everything is checked before anything is written. The config is written after the keys and certificates, and the store
moves last: each step is durable, and repeating all of them changes nothing. A killed call can so be repeated.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import tempfile
import tomllib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from outstation.device import config
from outstation.device.bootstrap.device import KEY_FILE, TLS_KEY_FILE
from outstation.device.recovery import new_log
from outstation.device.recovery.open import open_store
from outstation.device.recovery.open_files import LOCK
from outstation.device.store.store import DATABASE
from outstation.foundation import durable_files, input_files
from outstation.foundation.config.toml_files import encode_value
from outstation.foundation.errors import ConfigError, StorageBusy, UsageError, explain
from outstation.foundation.owner import become_owner, give_files
from outstation.protocol.wire import keys

CONFIG_FILE, CERTIFICATE_FILE = "outstation.toml", "device.crt"
# Modes, in the order in which they are written: a config names the files before it.
_MEMBERS = {
    KEY_FILE: 0o600,
    TLS_KEY_FILE: 0o600,
    "ca.pem": 0o644,
    CERTIFICATE_FILE: 0o644,
    "root.json": 0o644,
    CONFIG_FILE: 0o640,
}
_MAX_MEMBER_BYTES = 1 << 20
# Sections that a fleet decides. All other sections are the device's own.
FLEET_SECTIONS = ("broker", "collector", "operators", "updates")
# Keys of these sections that depend on the device's network: they stay, unless the fleet sets them.
_OWN_KEYS = {
    "broker": ("metered", "max_message_bytes", "compress"),
    "updates": ("window", "max_rate", "max_size", "poll_interval"),
}
# Ending of what a join replaced.
FORMER = ".before-join"
# All files that commands write for a device.
DEVICE_FILES = frozenset({*_MEMBERS, *(f"{name}{FORMER}" for name in _MEMBERS), f"{KEY_FILE}.pub"})
_STOP_HINT = "stop it first (sudo systemctl stop outstation), then join again"
_HEADER = re.compile(r"^\[\[?[ \t]*([A-Za-z0-9_-]+)[^\[\]\n]*\]\]?[ \t]*(#.*)?$")


class JoinPlan(msgspec.Struct, frozen=True):
    """Files to write into `folder`, in order; `replaced`: those that differ from files which are there.

    `sections`: those of a changed config that are replaced; the others stay. `data_dir`: the folder of the store.
    """

    folder: Path
    files: dict[str, bytes]
    replaced: list[str]
    sections: list[str]
    data_dir: Path
    fleet: str
    device: str


def read_enrolment(enrolment: Path) -> dict[str, bytes]:
    """Return the members of an enrolment file by name. Raises UsageError, also for unknown members."""
    members = {}
    try:
        # To its end first: only there does gzip check that the file is complete.
        with input_files.open_regular(enrolment) as packed, gzip.open(packed) as file:
            content = file.read(_MAX_MEMBER_BYTES * len(_MEMBERS))
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                inside = archive.extractfile(member) if member.isreg() and member.size <= _MAX_MEMBER_BYTES else None
                if member.name not in _MEMBERS or inside is None:
                    raise UsageError(f"{enrolment}: {member.name!r} does not belong in an enrolment file")
                members[member.name] = inside.read()
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        cause = explain(error) if isinstance(error, OSError) and error.errno else str(error)
        raise UsageError(
            f"{enrolment}: not readable as an enrolment file: {cause}; the operator makes one with "
            "`outstation fleet enrol --bundle-out`"
        ) from None
    if CONFIG_FILE not in members:
        raise UsageError(f"{enrolment}: no {CONFIG_FILE} in it; make it with `outstation fleet enrol --bundle-out`")
    return members


def plan(enrolment: Path, folder: Path, is_untouched: Callable[[str], bool], data_dir: str | None = None) -> JoinPlan:
    """Plan what joining with the file `enrolment` writes into `folder`. Raises UsageError, ConfigError.

    `is_untouched` is True for the text of a config that nobody has changed since a command wrote it. `data_dir` is for
    a device that has no config yet.
    """
    members = read_enrolment(enrolment)
    theirs = _decode(enrolment, members[CONFIG_FILE])
    _check_keys(enrolment, folder, members)
    ours_file, sections = folder / CONFIG_FILE, []
    text = members[CONFIG_FILE].decode()
    if ours_file.exists():
        ours = input_files.read_text(ours_file)
        data_dir = config.load(ours_file).device.data_dir
        if is_untouched(ours):
            text = set_data_dir(text, data_dir)
        else:
            text = merge_configs(ours_file, ours, text)
            former, merged = tomllib.loads(ours), tomllib.loads(text)
            sections = [name for name in FLEET_SECTIONS if former.get(name) != merged.get(name)]
            sections += [f"device.{key}" for key in ("id", "fleet") if former["device"][key] != theirs["device"][key]]
    elif data_dir is not None:
        text = set_data_dir(text, data_dir)
    check_config(str(enrolment), text)
    files = {name: members[name] for name in _MEMBERS if name in members} | {CONFIG_FILE: text.encode()}
    replaced = [
        name
        for name, content in files.items()
        if (folder / name).exists() and input_files.read_bytes(folder / name) != content
        if name != CONFIG_FILE or sections
        # A newer one for the key that is here.
        if name != CERTIFICATE_FILE or TLS_KEY_FILE in members
    ]
    device = theirs["device"]
    place = folder.resolve() / (data_dir or device.get("data_dir", ""))
    _require_stopped(place)
    return JoinPlan(folder, files, replaced, sections, place, device["fleet"], device["id"])


def require_stopped(folder: Path) -> None:
    """Raise UsageError if a daemon uses the store of the device whose config is in `folder`, ConfigError."""
    if (folder / CONFIG_FILE).exists():
        _require_stopped(config.load(folder / CONFIG_FILE).data_dir)


def apply(plan: JoinPlan) -> bool:
    """Carry out a plan; return True if a store that was there moved into the fleet. Raises UsageError, StorageError."""
    durable_files.make_folder(plan.folder)
    for name in plan.replaced:
        former, mode = input_files.read_bytes(plan.folder / name), _MEMBERS[name]
        if former != plan.files[name]:
            durable_files.write(plan.folder / (name + FORMER), former, mode)
    for name, content in plan.files.items():
        path = plan.folder / name
        if not path.exists() or input_files.read_bytes(path) != content:
            durable_files.write(path, content, _MEMBERS[name])
        if name == KEY_FILE:
            public = keys.load_private(path).public.text
            durable_files.write(keys.public_key_path(path), f"{public}\n".encode())
    conf = config.load(plan.folder / CONFIG_FILE)
    give_files(plan.folder, conf.data_dir, DEVICE_FILES)
    become_owner(conf.data_dir)
    if not (conf.data_dir / DATABASE).exists():
        return False
    try:
        with open_store(conf.data_dir, max_size=int(conf.buffer.max_size)) as store:
            return new_log.plan_move(store, plan.fleet, plan.device)
    except StorageBusy:
        raise UsageError(f"{conf.data_dir}: the daemon was started meanwhile; {_STOP_HINT}") from None


def merge_configs(file: Path, ours: str, theirs: str) -> str:
    """Return our config with the id, the fleet and the `FLEET_SECTIONS` of theirs. Raises UsageError.

    Keys of `_OWN_KEYS` stay.
    """
    wanted, former = tomllib.loads(theirs), tomllib.loads(ours)
    stays = {
        section: {key: former[section][key] for key in keys if key in former.get(section, {}).keys() - wanted[section]}
        for section, keys in _OWN_KEYS.items()
        if section in wanted
    }
    sections = _split_sections(theirs)
    merged, is_added = "", False
    for name, text in _split_sections(ours):
        if name in FLEET_SECTIONS:
            continue
        for key in ("id", "fleet") if name == "device" else ():
            text = _set_key(text, key, wanted["device"][key])
        merged += text
        if name == "device":
            merged = merged.rstrip("\n") + "\n\n"
            for other, added in sections:
                if other in FLEET_SECTIONS:
                    lines = (f"{key} = {encode_value(value)}\n" for key, value in stays.get(other, {}).items())
                    merged += f"{_without_examples(added)}\n{''.join(lines)}\n"
            is_added = True
    expected = {name: value for name, value in former.items() if name not in FLEET_SECTIONS}
    expected |= {name: wanted[name] | stays.get(name, {}) for name in FLEET_SECTIONS if name in wanted}
    expected["device"] = former["device"] | {key: wanted["device"][key] for key in ("id", "fleet")}
    if not is_added or _parse(merged) != expected:
        raise UsageError(
            f"{file}: its sections device, {', '.join(FLEET_SECTIONS)} cannot be told from the rest of the file; "
            "move it away, join, then copy your streams and tasks into the new one"
        )
    return merged


def set_data_dir(text: str, data_dir: str) -> str:
    """Return a config that a command wrote, with another data_dir."""
    return _set_key(text, "data_dir", data_dir)


def _set_key(text: str, key: str, value: str) -> str:
    """Return TOML in which the first line that sets `key` sets it to `value`."""
    line = f"{key} = {encode_value(value)}"
    return re.sub(rf"(?m)^{key}[ \t]*=.*$", lambda _: line, text, count=1)


def _check_keys(enrolment: Path, folder: Path, members: dict[str, bytes]) -> None:
    """Check that the keys that `outstation request` made in `folder` are those that `members` were issued for."""
    if KEY_FILE not in members and not (folder / KEY_FILE).exists():
        hint = "name the folder in which `outstation request` or `outstation init` made it with --dir"
        raise UsageError(f"{enrolment}: has no {KEY_FILE}, and {folder} has none either; {hint}")
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private: dict[str, Any] = {
            name: load_pem_private_key(members[name], password=None)
            for name in (KEY_FILE, TLS_KEY_FILE)
            if name in members
        }
        if CERTIFICATE_FILE not in members:
            return
        certified = x509.load_pem_x509_certificate(members[CERTIFICATE_FILE]).public_key()
    except (ValueError, TypeError):
        raise UsageError(f"{enrolment}: a key or certificate in it cannot be read; ask for the file again") from None
    tls_key = private.get(TLS_KEY_FILE) or keys.load_private(folder / TLS_KEY_FILE).private
    if certified != tls_key.public_key():
        raise UsageError(f"{enrolment}: answers another request than that of the keys in {folder}; ask for it again")


def _decode(enrolment: Path, content: bytes) -> dict[str, Any]:
    try:
        document = tomllib.loads(content.decode())
        if isinstance(document["device"]["id"], str) and isinstance(document["device"]["fleet"], str):
            return document
    except (ValueError, KeyError, TypeError):
        pass
    raise UsageError(f"{enrolment}: its {CONFIG_FILE} names no device and fleet; ask for the file again")


def check_config(source: str, text: str) -> None:
    """Check the config that `source` makes, before it is written. Raises UsageError."""
    with tempfile.TemporaryDirectory(prefix="outstation-") as folder:
        file = Path(folder) / CONFIG_FILE
        file.write_text(text, encoding="utf-8")
        try:
            config.load(file)
        except ConfigError as error:
            problem = f"the config of this device would be wrong: {error.key}: {error.problem}"
            raise UsageError(f"{source}: {problem}; nothing was written") from None


def _parse(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except ValueError:
        return None


def _split_sections(text: str) -> list[tuple[str, str]]:
    """Return (first key of the header, text) of each section, "" for what comes before the first header.

    Comments directly above a header belong to it.
    """
    sections: list[tuple[str, list[str]]] = [("", [])]
    for line in text.splitlines(keepends=True):
        if header := _HEADER.match(line.rstrip("\r\n")):
            before, above = sections[-1][1], list[str]()
            while before and before[-1].startswith("#"):
                above.insert(0, before.pop())
            sections.append((header[1], above))
        sections[-1][1].append(line)
    return [(name, "".join(lines)) for name, lines in sections]


def _without_examples(section: str) -> str:
    """Return a section of an enrolment without the commented examples behind its last key."""
    lines = section.splitlines()
    while lines and (not lines[-1].strip() or lines[-1].startswith("#")):
        lines.pop()
    return "\n".join(lines)


def _require_stopped(data_dir: Path) -> None:
    """Raise UsageError if a daemon uses the store."""
    if not (data_dir / LOCK).exists():
        return
    try:
        with durable_files.lock(data_dir / LOCK, wait=False):
            pass
    except BlockingIOError:
        raise UsageError(f"{data_dir}: a daemon uses this store; {_STOP_HINT}") from None
    except OSError as error:
        raise UsageError(f"{data_dir / LOCK}: {error.strerror}; join as the owner of the folder, or as root") from None
