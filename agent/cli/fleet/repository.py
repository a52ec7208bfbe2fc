"""`outstation fleet repository …`: the keys of what devices may fetch, and how long their word counts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.cli.fleet.common import fleet_option
from agent.cli.output import emit, json_option, print_table
from agent.fleet import config as fleet_config

if TYPE_CHECKING:
    from agent.fleet.repository.status import RepositoryStatus, RoleStatus

_path = click.Path(path_type=Path)
_sign_with = click.option(
    "--sign-with", multiple=True, type=_path, metavar="FILE", help="A private key that lies elsewhere, as on a stick."
)


@click.group()
def repository() -> None:
    """The TUF repository that devices fetch bundles from: keys, expiry, what is taken out."""


@repository.command("init", epilog="Example: outstation fleet repository init --roots 3 --threshold 2")
@click.option("--roots", default=1, metavar="N", help="How many root keys; 1.")
@click.option("--threshold", default=1, metavar="M", help="How many of them must sign a change of keys; 1.")
@click.option("--url", help="Where devices will find it: https://HOST/PATH, or a folder; `fleet enrol` tells them.")
@fleet_option
@json_option
def init(roots: int, threshold: int, url: str | None, folder: str | None, as_json: bool) -> None:
    """Make the fleet's repository, once: its keys, and metadata without bundles."""
    from agent.fleet.repository import address, create

    home = fleet_config.find_folder(folder)
    fleet_config.load(home)
    if url is not None:
        address.write(home, url)
    done = create.create(home, roots=roots, threshold=threshold)
    document = {"root": str(done.root), "threshold": done.threshold, "keys": [str(path) for path in done.keys]}
    emit(document, as_json, lambda: click.echo("\n".join(_creation_lines(home, document))))


def _creation_lines(home: Path, document: dict[str, Any]) -> list[str]:
    names = " ".join(Path(path).name for path in document["keys"])
    return [
        f"{home / 'repository'} made; serve it by HTTP(S), or copy it to a stick. Devices are given {document['root']}",
        f"Move {names} from {home / 'repository-keys'} to media that lie apart, now: {document['threshold']} of "
        f"{len(document['keys'])} decide whose keys count. targets-1.key is needed for the first bundle of a name.",
    ]


@repository.command("status", epilog="Example: outstation fleet repository status --json")
@fleet_option
@json_option
def status(folder: str | None, as_json: bool) -> None:
    """What is published, whose keys count, what expires when. Exit 1 where something is to be done soon."""
    from agent.fleet.repository import status as standing

    found = standing.read(fleet_config.find_folder(folder))
    emit(found, as_json, lambda: _print(found))
    if not found.ok:
        sys.exit(1)


def _print(report: RepositoryStatus) -> None:
    bundles = [[one.name, one.version, one.digest[7:23], one.bytes] for one in report.bundles]
    print_table(
        ["bundle", "version", "digest", "bytes"], bundles, "No bundle is published: outstation fleet publish BUNDLE"
    )
    for one in report.revoked:
        click.echo(f"{one['name']} {one['version']} was taken out on {one['day']}")
    click.echo()
    rows = [[one.role, one.version, one.expires, one.days_left, _format_keys(one)] for one in report.roles]
    print_table(["role", "version", "expires", "days", "keys"], rows, "")
    for line in report.reminders:
        click.echo(click.style(line, fg="yellow"))


def _format_keys(role_status: RoleStatus) -> str:
    names = ", ".join(key.name if key.has_private_key else f"{key.name} (elsewhere)" for key in role_status.keys)
    return names if len(role_status.keys) == 1 else f"{role_status.threshold} of {names}"


@repository.command("refresh", epilog="Example: outstation fleet repository refresh")
@click.option(
    "--trust-clock", is_flag=True, help="This machine's clock is right now, and was ahead when it signed last."
)
@_sign_with
@fleet_option
@json_option
def refresh(trust_clock: bool, sign_with: tuple[Path, ...], folder: str | None, as_json: bool) -> None:
    """Sign the timestamp anew, and what else expires soon and has its key here; for cron, each day.

    A draft of the root that enough have signed comes into force.
    """
    from agent.fleet.repository import upkeep

    done = upkeep.refresh(fleet_config.find_folder(folder), sign_with=sign_with, trust_clock=trust_clock)
    until = f"{done.expires:%Y-%m-%dT%H:%M:%SZ}"
    document = {"roles": done.roles, "expires": until, "root": done.root_version or None}
    root = f"root {done.root_version} is in force\n" if done.root_version else ""
    emit(document, as_json, lambda: click.echo(f"{root}signed: {', '.join(done.roles)}; counts until {until}"))


@repository.command(
    "rotate", epilog="Example: outstation fleet repository rotate root --key root-2 --sign-with root-1.key"
)
@click.argument("role")
@click.option("--key", "old", metavar="NAME", help="The key that goes, where the role has several.")
@click.option(
    "--new", metavar="PUB", help="The public key that comes, as text or in a file; without it one is made here."
)
@_sign_with
@fleet_option
@json_option
def rotate(
    role: str, old: str | None, new: str | None, sign_with: tuple[Path, ...], folder: str | None, as_json: bool
) -> None:
    """Another key for ROLE: root, targets, snapshot, timestamp, or a bundle's name. The old one counts no more.

    Root says who the first four are: where too few of its keys are here, root.json.draft waits for their signatures,
    and the exit code is 1.
    """
    from agent.fleet.repository import key_rotation as rotating

    done = rotating.rotate(fleet_config.find_folder(folder), role, old=old, new=new, sign_with=sign_with)
    draft = done.draft
    document = {"role": role, "old": done.old, "new": done.new, "in_force": done.is_complete, "draft": draft}
    said = f"{role}: {done.new} counts, {done.old} no more; delete its file"
    if draft is not None and draft.signatures_missing:
        said = (
            f"{role}: {done.new} for {done.old} waits for {draft.signatures_missing} more signatures of the root keys "
            f"{', '.join(draft.may_sign)}; carry root.json.draft to them: outstation fleet repository sign-root"
        )
    emit(document, as_json, lambda: click.echo(said))
    if not done.is_complete:
        sys.exit(1)


@repository.command("revoke", epilog="Example: outstation fleet repository revoke exercise 1.3.0")
@click.argument("bundle")
@click.argument("version", required=False)
@_sign_with
@fleet_option
@json_option
def revoke(bundle: str, version: str | None, sign_with: tuple[Path, ...], folder: str | None, as_json: bool) -> None:
    """Take VERSION of BUNDLE, or all of them, out of the repository for good. To revoke a key, `rotate` it.

    Devices fetch it no more. Those that run it go on: `fleet rollout` gives them another one.
    """
    from agent.fleet.repository import revoke as revoking

    done = revoking.revoke(fleet_config.find_folder(folder), bundle, version, sign_with=sign_with)
    document = {"bundle": done.bundle, "versions": done.versions}
    emit(document, as_json, lambda: click.echo(f"{done.bundle}: taken out {', '.join(done.versions)}"))


@repository.command(
    "sign-root", epilog="Example: outstation fleet repository sign-root --key root-2.key root.json.draft"
)
@click.argument("file", type=_path)
@click.option("--key", required=True, type=_path, metavar="FILE", help="The root key, on the machine where it lies.")
@json_option
def sign_root(file: Path, key: Path, as_json: bool) -> None:
    """Sign a draft of the root, on any machine.

    When enough have signed, and it is back in its place, `refresh` puts it in force.
    """
    from agent.fleet.repository import root_rotation as roots

    done = roots.sign(file, key)
    document = {"file": str(file), "version": done.version, "signatures": done.signatures, "roles": done.roles}
    lines = [f"root {done.version}, signed by {done.signatures}; whose keys count with it:"]
    lines += [f"  {role}: {', '.join(names)}" for role, names in done.roles.items()]
    emit(document, as_json, lambda: click.echo("\n".join(lines)))


@repository.command("copy", epilog="Example: outstation fleet repository copy /media/stick")
@click.argument("destination", metavar="TO", type=_path)
@fleet_option
@json_option
def copy(destination: Path, folder: str | None, as_json: bool) -> None:
    """Make TO/repository the same: a stick for sites without network, or what a web server serves."""
    from agent.fleet.repository import mirror as copying

    done = copying.copy(fleet_config.find_folder(folder), destination)
    document = {"repository": str(done.home), "files": done.files, "bytes": done.bytes}
    said = f"{done.home}: {done.files} files, {done.bytes / 1e6:.1f} MB written; devices find it with url = that folder"
    emit(document, as_json, lambda: click.echo(said))
