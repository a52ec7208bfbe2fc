"""`outstation model …`: make, sign and check bundles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from agent.cli.output import emit, json_option
from agent.errors import BadBundle, UsageError
from agent.wire import keys

_path = click.Path(path_type=Path)


@click.group()
def model() -> None:
    """Bundles: a model with its labels, drift reference, golden vectors and cards, signed."""


@model.command(epilog="Example: outstation model keygen publisher.key")
@click.argument("file", type=_path)
@json_option
def keygen(file: Path, as_json: bool) -> None:
    """Make a publisher's key; devices trust its public half from [publishers] keys."""
    key = keys.generate(file).public
    document = {"file": str(file), "key": key.text, "thumbprint": key.kid}
    emit(
        document,
        as_json,
        lambda: click.echo(f"{file} written, mode 0600\nkey         {key.text}\nthumbprint  {key.kid}"),
    )


@model.command(epilog="Example: outstation model pack bundle.toml -o exercise --key publisher.key")
@click.argument("spec", type=_path)
@click.option("-o", "--out", required=True, type=_path, help="The bundle's folder, or a .zip.")
@click.option("--key", "key_file", type=_path, help="The publisher's key; without it the bundle stays unsigned.")
@json_option
def pack(spec: Path, out: Path, key_file: Path | None, as_json: bool) -> None:
    """Make a bundle from SPEC, and say what it lacks."""
    from agent.model import pack as packing

    packed = packing.pack(spec, keys.load_private(key_file) if key_file else None)
    old = out / "manifest.jws"
    # The same content needs no new signature: who has no key can still rebuild and compare.
    if key_file is None and old.is_file() and (out / "manifest.json").read_bytes() == packed.files["manifest.json"]:
        packed.files["manifest.jws"] = old.read_bytes()
        packed.warnings.remove(next(w for w in packed.warnings if w.startswith("not signed")))
    packing.write(packed, out)
    document = {"bundle": str(out), "digest": packed.digest, "warnings": packed.warnings}
    emit(
        document,
        as_json,
        lambda: click.echo("\n".join([f"{out} {packed.digest}", *(f"warning: {w}" for w in packed.warnings)])),
    )


@model.command(epilog="Example: outstation model sign exercise --key publisher.key")
@click.argument("bundle", type=_path)
@click.option("--key", "key_file", required=True, type=_path, help="The publisher's key.")
@json_option
def sign(bundle: Path, key_file: Path, as_json: bool) -> None:
    """Sign a bundle folder, after checking that its files are what its manifest says."""
    from agent.model import bundle as bundles

    if not bundle.is_dir():
        raise UsageError(f"{bundle}: sign the folder, then zip it")
    found = bundles.read(bundle, None)
    key = keys.load_private(key_file)
    (bundle / "manifest.jws").write_bytes(bundles.sign(found.files["manifest.json"], key))
    document = {"bundle": str(bundle), "digest": found.digest, "thumbprint": key.public.kid}
    emit(document, as_json, lambda: click.echo(f"{bundle} {found.digest}\nsigned by {key.public.kid}"))


@model.command(epilog="Example: outstation model check exercise --key publisher.key.pub")
@click.argument("bundle", type=_path)
@click.option("--key", "public", help="The publisher's public key, as text or in a file.")
@json_option
def check(bundle: Path, public: str | None, as_json: bool) -> None:
    """Signature, hashes, load in a child process, golden vectors."""
    document = _check(bundle, public)
    emit(document, as_json, lambda: _print(document))
    if not document["ok"]:
        sys.exit(1)


def _check(path: Path, public: str | None) -> dict[str, Any]:
    from agent.model import bundle as bundles
    from agent.model import probe, shipped

    document: dict[str, Any] = {
        "ok": False,
        "name": None,
        "version": None,
        "digest": None,
        "runtime": None,
        "checks": [],
    }

    def note(name: str, ok: bool, detail: str) -> None:
        document["checks"].append({"name": name, "ok": ok, "detail": detail})

    trusted = [keys.load_public(public)] if public else None
    try:
        found = bundles.read(path, trusted)
    except BadBundle as problem:
        note("signature and hashes", False, str(problem))
        return document
    known = {key.kid for key in shipped.publishers()}
    if trusted or found.signer in known:
        bundles.read(path, trusted or shipped.publishers())
        note("signature", True, f"by {found.signer}")
    elif found.signer:
        note("signature", True, f"claims {found.signer}, not verified: give the publisher's public key with --key")
    else:
        note("signature", False, "not signed; sign it with `outstation model sign`")
    note("hashes", True, f"{len(found.manifest.files)} files as the manifest says")
    report = probe.probe(found)
    for name, ok, detail in report.checks:
        note(name, ok, detail)
    document |= {"name": found.manifest.name, "version": found.manifest.version, "digest": found.digest}
    document |= {"runtime": report.runtime, "ok": all(check["ok"] for check in document["checks"])}
    return document


def _print(document: dict[str, Any]) -> None:
    click.echo(f"{document['name'] or 'bundle'} {document['version'] or ''} {document['digest'] or ''}".strip())
    for one in document["checks"]:
        mark = click.style("ok    ", fg="green") if one["ok"] else click.style("failed", fg="red")
        click.echo(f"{mark}  {one['name']}: {one['detail']}")
