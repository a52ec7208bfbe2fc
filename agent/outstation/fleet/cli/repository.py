"""`outstation fleet publish` and `repository`: the TUF repository of bundles, its keys and its expiry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from outstation.fleet import config as fleet_config
from outstation.fleet.cli.common import fleet_options
from outstation.foundation.cli.groups import SentenceGroup
from outstation.foundation.cli.options import PATH, json_option
from outstation.foundation.cli.output import echo, echo_styled, emit, print_table
from outstation.foundation.errors import UsageError
from outstation.foundation.text import printable
from outstation.protocol.wire import keys

if TYPE_CHECKING:
    from outstation.fleet.repository.repository_status import RepositoryStatus

_sign_with = click.option("--sign-with", multiple=True, type=PATH, metavar="FILE",
                          help="A private key that is not in the fleet's folder, as on a USB stick.")  # fmt: skip


@click.command("publish", epilog="Example: outstation fleet publish exercise --publisher publisher.key.pub")
@click.argument("bundle", type=PATH)
@click.option(
    "--publisher", "public", multiple=True, metavar="PUB", help="A publisher's public key, as text or in a file."
)
@click.option("--no-probe", is_flag=True,
              help="Do not load the bundle first; publish its memory limit in place of the measured need.")  # fmt: skip
@_sign_with
@fleet_options
def publish(
    bundle: Path, public: tuple[str, ...], no_probe: bool, sign_with: tuple[Path, ...], home: Path, as_json: bool
) -> None:
    """Add BUNDLE, a path or the name of a built-in bundle, to the fleet's repository.

    A --publisher, the publisher of the built-in bundles, or the fleet's operator must have signed it. No device runs
    it before a rollout. Publishing the same bundle again changes nothing; another one needs another version.
    """
    from outstation.fleet.repository import publish as publishing
    from outstation.ml.model.bundle import builtin

    # The operator's private key may be elsewhere.
    operator = keys.load_public_for(Path(fleet_config.load(home).operator.key_file))
    trusted = [operator, *builtin.publisher_keys(), *(keys.load_public(text) for text in public)]
    done = publishing.publish(home, builtin.resolve_path(bundle), trusted, run_probe=not no_probe, sign_with=sign_with)
    metadata = done.target_metadata
    document = {
        "name": metadata.name,
        "version": metadata.version,
        "digest": metadata.digest,
        "target": done.target,
        "bytes": done.bytes,
        "memory": metadata.memory,
        "signer": done.signer,
        "created": done.is_new,
    }
    state = "published" if done.is_new else "was published already"
    text = (
        f"{metadata.name} {metadata.version} {state}: {done.target}, {done.bytes / 1e3:.0f} kB, "
        f"{metadata.memory / 2**20:.0f} MiB of memory\n{metadata.digest}"
    )
    emit(document, as_json, lambda: echo(text))


@click.group(cls=SentenceGroup)
def repository() -> None:
    """Maintain the TUF repository of bundles: keys, expiry, revoked bundles."""


@repository.command("init", epilog="Example: outstation fleet repository init --root-keys /media/stick")
@click.option("--root-keys", type=PATH, metavar="FOLDER",
              help="Folder for the root keys, outside the fleet's folder: a removable medium.")  # fmt: skip
@click.option("--demo", is_flag=True, help="Keep the root keys in the fleet's folder, for demonstrations only.")
@click.option("--roots", type=int, metavar="N", help="Number of root keys; default 3, with --demo 1.")
@click.option("--threshold", type=int, metavar="M",
              help="Root keys that must sign a change of keys; default 2, with one root key 1.")  # fmt: skip
@click.option(
    "--url", help="Its address for devices: https://HOST/PATH, or a folder; `enrol` writes it to their config."
)
@fleet_options
def init(
    root_keys: Path | None,
    demo: bool,
    roots: int | None,
    threshold: int | None,
    url: str | None,
    home: Path,
    as_json: bool,
) -> None:
    """Create the fleet's repository, once: its keys, and metadata without bundles.

    The root keys can change every other key, those of operators and collector too; two of three must sign a change.
    They are written to --root-keys: mount a removable medium there, move each key to a medium of its own afterwards,
    and store these apart.
    """
    from outstation.fleet.repository import create

    if demo == (root_keys is not None):
        raise UsageError(
            "the root keys must not lie with the online keys; give --root-keys FOLDER, a mounted removable medium such "
            "as /media/stick, or --demo, which keeps them in the fleet's folder"
        )
    fleet_config.load(home)
    if url is not None:
        create.write_url(home, url)
    roots = roots if roots is not None else 1 if demo else max(3, threshold or 0)
    # One stolen key must not change the others.
    threshold = threshold if threshold is not None else min(2, roots)
    done = create.create(home, root_keys, roots=roots, threshold=threshold)
    document = {"root": str(done.root), "threshold": done.threshold, "keys": [str(path) for path in done.keys]}
    names = " ".join(path.name for path in done.keys)
    text = (
        f"{home / 'repository'} created; serve it by HTTP(S), or copy it to a stick. Devices get {done.root}\n"
        f"Move {names} from {done.keys[0].parent} to separate offline media now: {done.threshold} of "
        f"{len(done.keys)} can change all keys. targets-1.key is needed for the first bundle of each name."
    )
    if done.threshold == 1 and not demo:
        text += (
            "\nThreshold 1: whoever has one root key changes operators, collectors and publishers at once, alone. By "
            "default two of three must sign."
        )
    emit(document, as_json, lambda: echo(text))


@repository.command("status", epilog="Example: outstation fleet repository status --json")
@fleet_options
def status(home: Path, as_json: bool) -> None:
    """Show published bundles, keys and expiry. Exit 1 if something needs the operator soon."""
    from outstation.fleet.repository.repository_status import read

    report = read(home)
    emit(report, as_json, lambda: _print_status(report), passed=report.ok)


def _print_status(report: RepositoryStatus) -> None:
    bundles = [[bundle.name, bundle.version, bundle.digest[7:23], bundle.bytes] for bundle in report.bundles]
    empty = "No bundle is published: outstation fleet publish BUNDLE"
    print_table(["bundle", "version", "digest", "bytes"], bundles, empty)
    for revoked in report.revoked:
        echo(f"{revoked['name']} {revoked['version']} was revoked on {revoked['day']}")
    echo()
    rows = []
    for role in report.roles:
        away = " (not in the fleet's folder)"
        names = ", ".join(key.name + ("" if key.has_private_key else away) for key in role.keys)
        names = names if len(role.keys) == 1 else f"{role.threshold} of {names}"
        rows.append([role.role, role.version, role.expires, role.days_left, names])
    print_table(["role", "version", "expires", "days", "keys"], rows, "")
    for line in report.reminders:
        echo_styled(click.style(printable(line), fg="yellow"))


@repository.command("refresh", epilog="Example: outstation fleet repository refresh")
@click.option("--trust-clock", is_flag=True, help="Sign although this machine's clock was ahead at the last signature.")
@_sign_with
@fleet_options
def refresh(trust_clock: bool, sign_with: tuple[Path, ...], home: Path, as_json: bool) -> None:
    """Sign the timestamp again, and other roles that expire soon and have their key here; run it from cron each day.

    A draft of the root with enough signatures comes into force.
    """
    from outstation.fleet.repository import upkeep

    done = upkeep.refresh(home, sign_with=sign_with, trust_clock=trust_clock)
    until = f"{done.expires:%Y-%m-%dT%H:%M:%SZ}"
    document = {"roles": done.roles, "expires": until, "root": done.root_version or None}
    root = f"root {done.root_version} is in force\n" if done.root_version else ""
    emit(document, as_json, lambda: echo(f"{root}signed: {', '.join(done.roles)}; valid until {until}"))


@repository.command(
    "rotate", epilog="Example: outstation fleet repository rotate root --old root-2 --sign-with root-1.key"
)
@click.argument("role")
@click.option("--old", "old", metavar="NAME", help="The key to replace, if the role has several.")
@click.option("--new", metavar="PUB", help="The new public key, as text or in a file; default a new key.")
@_sign_with
@fleet_options
def rotate(role: str, old: str | None, new: str | None, sign_with: tuple[Path, ...], home: Path, as_json: bool) -> None:
    """Replace a key of ROLE: root, targets, snapshot, timestamp, or a bundle's name. The old key is invalid then.

    The root signs the keys of the first four. If too few root keys are here, root.json.draft waits for their
    signatures, and the exit code is 1.
    """
    from outstation.fleet.repository import key_rotation as rotating

    done = rotating.rotate(home, role, old=old, new=new, sign_with=sign_with)
    draft = done.draft
    document = {"role": role, "old": done.old, "new": done.new, "in_force": done.is_complete, "draft": draft}
    result = f"{role}: {done.new} is valid, {done.old} is not; delete its file"
    if draft is not None and draft.signatures_missing:
        result = (
            f"{role}: {done.new} for {done.old} needs {draft.signatures_missing} more signatures of the root keys "
            f"{', '.join(draft.may_sign)}; carry root.json.draft to them: outstation fleet repository sign-root"
        )
    emit(document, as_json, lambda: echo(result), passed=done.is_complete)


@repository.command("revoke", epilog="Example: outstation fleet repository revoke exercise 1.3.0")
@click.argument("bundle")
@click.argument("version", required=False)
@_sign_with
@fleet_options
def revoke(bundle: str, version: str | None, sign_with: tuple[Path, ...], home: Path, as_json: bool) -> None:
    """Remove VERSION of BUNDLE, or all versions, from the repository permanently. To revoke a key, `rotate` it.

    Devices no longer fetch it. Devices that run it continue, until `fleet rollout` gives them another bundle.
    """
    from outstation.fleet.repository import revoke as revoking

    done = revoking.revoke(home, bundle, version, sign_with=sign_with)
    document = {"bundle": done.bundle, "versions": done.versions}
    emit(document, as_json, lambda: echo(f"{done.bundle}: revoked {', '.join(done.versions)}"))


@repository.command(
    "sign-root", epilog="Example: outstation fleet repository sign-root --sign-with root-2.key root.json.draft"
)
@click.argument("file", type=PATH)
@click.option(
    "--sign-with", "key", required=True, type=PATH, metavar="FILE", help="The root key, on the machine that has it."
)
@json_option
def sign_root(file: Path, key: Path, as_json: bool) -> None:
    """Sign a draft of the root, on any machine.

    With enough signatures, and back in its place, `refresh` puts it into force.
    """
    from outstation.fleet.repository import root_rotation

    done = root_rotation.sign(file, key)
    document = {"file": str(file), "version": done.version, "signatures": done.signatures, "roles": done.roles}
    lines = [f"root {done.version}, signed by {done.signatures}; its keys:"]
    lines += [f"  {role}: {', '.join(names)}" for role, names in done.roles.items()]
    emit(document, as_json, lambda: echo("\n".join(lines)))


@repository.command("copy", epilog="Example: outstation fleet repository copy /media/stick")
@click.argument("destination", metavar="TO", type=PATH)
@fleet_options
def copy(destination: Path, home: Path, as_json: bool) -> None:
    """Mirror the repository to TO/repository: a stick for sites without network, or the folder of a web server."""
    from outstation.fleet.repository import mirror

    done = mirror.copy(home, destination)
    document = {"repository": str(done.home), "files": done.files, "bytes": done.bytes}
    result = f"{done.home}: {done.files} files, {done.bytes / 1e6:.1f} MB written; devices use this folder as url"
    emit(document, as_json, lambda: echo(result))
