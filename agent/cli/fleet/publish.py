"""`outstation fleet publish`: add a bundle to the fleet's repository."""

from __future__ import annotations

from pathlib import Path

import click

from agent.cli.fleet.common import fleet_option
from agent.cli.output import emit, json_option
from agent.fleet import config as fleet_config
from agent.wire import keys
from agent.wire.keys import PublicKey

_path = click.Path(path_type=Path)


@click.command("publish", epilog="Example: outstation fleet publish exercise --key publisher.key.pub")
@click.argument("bundle", type=_path)
@click.option("--key", "public", multiple=True, metavar="PUB", help="A publisher's public key, as text or in a file.")
@click.option(
    "--no-probe",
    is_flag=True,
    help="Do not load the bundle first; publish its memory limit in place of the measured need.",
)
@click.option(
    "--sign-with", multiple=True, type=_path, metavar="FILE", help="A private key that is not in the fleet's folder."
)
@fleet_option
@json_option
def publish(
    bundle: Path,
    public: tuple[str, ...],
    no_probe: bool,
    sign_with: tuple[Path, ...],
    folder: str | None,
    as_json: bool,
) -> None:
    """Add BUNDLE, a path or the name of a built-in bundle, to the fleet's repository.

    It must be signed by a --key, by the publisher of the built-in bundles, or by the fleet's operator. No device runs
    it before a rollout. Publishing the same bundle again changes nothing; another one needs another version.
    """
    from agent.fleet.repository import publish as publishing
    from agent.model.bundle import builtin

    home = fleet_config.find_folder(folder)
    trusted = [*_load_operator_keys(home), *builtin.publisher_keys(), *(keys.load_public(text) for text in public)]
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
    emit(
        document,
        as_json,
        lambda: click.echo(
            f"{metadata.name} {metadata.version} {state}: {done.target}, {done.bytes / 1e3:.0f} kB, "
            f"{metadata.memory / 2**20:.0f} MiB of memory\n{metadata.digest}"
        ),
    )


def _load_operator_keys(home: Path) -> list[PublicKey]:
    """Load the operator's public key; the private key may be elsewhere."""
    return [keys.load_public_for(Path(fleet_config.load(home).operator.key_file))]
