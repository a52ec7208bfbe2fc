"""`outstation fleet keys`: the keys that may command devices and acknowledge messages, signed by the root keys."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from outstation.fleet import config as fleet_config
from outstation.fleet.cli.common import fleet_options
from outstation.foundation.cli.groups import SentenceGroup
from outstation.foundation.cli.options import PATH
from outstation.foundation.cli.output import echo, echo_styled, emit, print_table

if TYPE_CHECKING:
    from outstation.fleet.repository.trust import TrustEdit
    from outstation.fleet.repository.trust_change import TrustReport

_sign_with = click.option("--sign-with", multiple=True, type=PATH, metavar="FILE",
                          help="A root key, as on a USB stick.")  # fmt: skip


# A public key or a thumbprint in base64url, of which one in 64 begins with "-".
_KEY_LIKE_AN_OPTION = re.compile(r"-[A-Za-z0-9_-]{42}")


class _KeyCommand(click.Command):
    """A command that takes a key which begins with "-" as an argument."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        keys = [arg for arg in args if _KEY_LIKE_AN_OPTION.fullmatch(arg)]
        return super().parse_args(ctx, [*(arg for arg in args if arg not in keys), "--", *keys] if keys else args)


@click.group(
    cls=SentenceGroup,
    places={
        "collector": "outstation.fleet.cli.collect:collector",
        "homeassistant": "outstation.fleet.cli.collect:homeassistant",
        "reissue": "outstation.fleet.cli.collect:reissue",
        "viewer": "outstation.fleet.cli.watch:viewer",
    },
)
def keys() -> None:
    """Add and revoke the keys of operators and collector on all devices.

    \b
    operator    may send all commands, and sign desired states
    deployer    may sign desired states, and send rollback and report
    reporter    may send report
    collector   signs acknowledgements
    encryption  opens messages that devices seal, see rotate-encryption

    A threshold of the repository's root keys signs each change. If too few are here, root.json.draft waits for
    `outstation fleet repository sign-root` on the machines that have them; then run `fleet repository refresh`.
    """


@keys.command("show", epilog="Example: outstation fleet keys show")
@fleet_options
def show(home: Path, as_json: bool) -> None:
    """List the trusted keys with their roles, and the draft that waits for signatures."""
    from outstation.fleet.repository import trust_change

    report = trust_change.read(home)
    emit(report, as_json, lambda: _print_report(report))


@keys.command(
    "add", cls=_KeyCommand, epilog="Example: outstation fleet keys add deployer ci.key.pub --sign-with root-1.key"
)
@click.argument("role")
@click.argument("public", metavar="PUB")
@_sign_with
@fleet_options
def add(role: str, public: str, sign_with: tuple[Path, ...], home: Path, as_json: bool) -> None:
    """Trust the public key PUB, as text or in a file, in ROLE. Exit 1 if more root keys must sign."""
    from outstation.fleet.repository.trust import add_key

    _change(home, add_key(role, public), sign_with, as_json)


@keys.command("revoke", cls=_KeyCommand, epilog="Example: outstation fleet keys revoke KEY --sign-with root-1.key")
@click.argument("key")
@_sign_with
@fleet_options
def revoke(key: str, sign_with: tuple[Path, ...], home: Path, as_json: bool) -> None:
    """Revoke KEY, a public key or its thumbprint, in all its roles. Exit 1 if more root keys must sign."""
    from outstation.fleet.repository.trust import revoke_key

    _change(home, revoke_key(key), sign_with, as_json)


@keys.command("reset-counter", cls=_KeyCommand, epilog="Example: outstation fleet keys reset-counter KEY")
@click.argument("key")
@_sign_with
@fleet_options
def reset_counter(key: str, sign_with: tuple[Path, ...], home: Path, as_json: bool) -> None:
    """Let devices that stored a counter of KEY far in the future accept its commands again.

    Exit 1 if more root keys must sign.
    """
    from outstation.fleet.repository.trust import reset_counter as edit

    _change(home, edit(key, time.time_ns() // 1_000_000), sign_with, as_json)


@keys.command("rotate-encryption", epilog="Example: outstation fleet keys rotate-encryption --sign-with root-1.key")
@_sign_with
@fleet_options
def rotate_encryption(sign_with: tuple[Path, ...], home: Path, as_json: bool) -> None:
    """Make a new key that devices with [privacy] encrypt seal their messages to, in the folder encryption.

    Collectors here use it within seconds; copy the file to collectors elsewhere before you publish. Messages sealed to
    a former key are opened until you delete its file. Exit 1 if more root keys must sign.
    """
    from outstation.fleet.collector import encryption_keys
    from outstation.fleet.repository import trust_change
    from outstation.fleet.repository.trust import replace_encryption_key

    # Without a repository nothing could tell devices of the key.
    trust_change.read(home)
    path = encryption_keys.create(home)
    made = encryption_keys.load_public(home)
    assert made is not None
    if not as_json:
        echo(f"{path}: the new key, {made.text}")
    _change(home, replace_encryption_key(made.text), sign_with, as_json)


@keys.command("publish", epilog="Example: outstation fleet keys publish")
@fleet_options
def publish(home: Path, as_json: bool) -> None:
    """Send the roots to all devices, as a retained message. Devices also find them in the repository."""
    from outstation.fleet.commands import send_retained
    from outstation.fleet.repository import trust_change
    from outstation.protocol.transport.mqtt import Link
    from outstation.protocol.transport.packets import OutgoingMessage
    from outstation.protocol.wire.trust import topic_for

    config = fleet_config.load(home)
    payload, topic = trust_change.build_message(home), topic_for(config.fleet.name)
    with Link(config.command_broker, f"outstation-{config.fleet.name}-keys-{os.getpid()}", subscribe=[]) as link:
        send_retained(link, [OutgoingMessage(topic, payload, (), retain=True)])
    document = {"topic": topic, "bytes": len(payload)}
    emit(document, as_json, lambda: echo(f"{topic}: {len(payload)} bytes; devices obey the newest root"))


def _change(home: Path, edit: TrustEdit, sign_with: tuple[Path, ...], as_json: bool) -> None:
    from outstation.fleet.repository import trust_change

    draft = trust_change.change(home, edit, sign_with=sign_with)
    is_complete = draft.signatures_missing == 0
    text = f"root {draft.version} is in force; send it to devices: outstation fleet keys publish"
    if not is_complete:
        text = (
            f"root {draft.version} needs {draft.signatures_missing} more signatures of the root keys "
            f"{', '.join(draft.may_sign)}; carry root.json.draft to them: outstation fleet repository sign-root"
        )
    document = {"in_force": is_complete, "draft": msgspec.to_builtins(draft)}
    emit(document, as_json, lambda: echo(text), passed=is_complete)


def _print_report(report: TrustReport) -> None:
    rows = [[entry.role, entry.key, entry.kid] for entry in report.keys]
    print_table(["role", "key", "thumbprint"], rows, "")
    if report.is_config:
        echo("The root has no trust document yet: devices use the keys of their config.")
    if report.draft is not None:
        missing = report.draft.signatures_missing
        echo_styled(click.style(f"root {report.draft.version} needs {missing} more signatures", fg="yellow"))
