"""`outstation model …`: make, sign and check bundles."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.cli import trust
from agent.cli.model.config import config_command
from agent.cli.model.evaluate import evaluate
from agent.cli.model.run import run
from agent.cli.output import emit, json_option
from agent.errors import BadBundle, UsageError
from agent.wire import keys

if TYPE_CHECKING:
    from agent.drift.baseline.reference import Reference
    from agent.model.bundle.manifest import Manifest
    from agent.model.inference.runtime import TfliteModel

_path = click.Path(path_type=Path)


@click.group()
def model() -> None:
    """Bundles: a model with its labels, drift reference, golden vectors and cards, signed."""


model.add_command(run)
model.add_command(evaluate)
model.add_command(config_command)


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
@click.argument("spec", type=_path, required=False)
@click.option("-o", "--out", type=_path, help="The bundle's folder, or a .zip; with --from the SPEC to write.")
@click.option("--key", "key_file", type=_path, help="The publisher's key; without it the bundle stays unsigned.")
@click.option("--from", "tflite", type=_path, help="Write a SPEC to fill in for this .tflite instead.")
@click.option("--data", type=_path, help="With --from: CSV or Parquet beside the model, whose columns are its fields.")
@json_option
def pack(
    spec: Path | None, out: Path | None, key_file: Path | None, tflite: Path | None, data: Path | None, as_json: bool
) -> None:
    """Make a bundle from SPEC, and say what it lacks; or, with --from, a SPEC from a model."""
    from agent.authoring import pack as packing

    if tflite is not None:
        if spec is not None or key_file is not None:
            raise UsageError("--from writes a SPEC and packs nothing; fill the SPEC in, then pack that")
        _write_spec(tflite, out, data, as_json)
        return
    if spec is None or out is None or data is not None:
        raise UsageError(
            "give SPEC and -o, the bundle to make; or --from MODEL.tflite, with --data where there is some, for a SPEC"
        )
    packed = packing.pack(spec, keys.load_private(key_file) if key_file else None)
    # The same content needs no new signature: who has no key can still rebuild and compare.
    if key_file is None:
        packing.reuse_signature(packed, out)
    packing.write_bundle(packed, out)
    document = {"bundle": str(out), "digest": packed.digest, "warnings": packed.warnings, "notes": packed.notes}
    said = [f"{out} {packed.digest}", *packed.notes, *(f"warning: {w}" for w in packed.warnings)]
    emit(document, as_json, lambda: click.echo("\n".join(said)))


def _write_spec(tflite: Path, out: Path | None, data: Path | None, as_json: bool) -> None:
    from agent.authoring import scaffold

    begun = scaffold.scaffold_spec(tflite, out, data)
    if out is not None:
        scaffold.write_spec(begun, out)
    document = {"spec": str(out) if out else None, "kind": begun.kind, "text": begun.text}
    said = (
        begun.text if out is None else f"{out} written, kind {begun.kind}: {begun.rationale}. Look at every line of it."
    )
    emit(document, as_json, lambda: click.echo(said, nl=out is not None))


@model.command("reference", epilog="Example: outstation model reference quiet.npz --spec bundle.toml -o reference.json")
@click.argument("data", type=_path)
@click.option("--bundle", type=_path, help="For the model of this bundle.")
@click.option("--spec", type=_path, help="For the model that this SPEC names.")
@click.option("-o", "--out", required=True, type=_path, help="The file to write.")
@click.option(
    "--held-out", is_flag=True, help="The model was not trained on DATA: its labels tell how good scores are."
)
@json_option
def make_reference(
    data: Path, bundle: Path | None, spec: Path | None, out: Path, held_out: bool, as_json: bool
) -> None:
    """Make a drift reference from DATA in which nothing drifts, in the order it was recorded."""
    from agent.authoring import pack as packing

    if (bundle is None) == (spec is None):
        raise UsageError("give one of --bundle and --spec: a reference is made for a model")
    made = packing.build_reference(data, *_load_model(bundle, spec), held_out=held_out)
    try:
        out.write_bytes(made.to_json())
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}") from None
    document = {"file": str(out), "digest": made.digest, "windows": made.drift_windows, "warning": made.warning}
    warning = f"\nwarning: {made.warning}" if made.warning else ""
    emit(document, as_json, lambda: click.echo(f"{out} {made.digest}, {made.drift_windows} drift windows{warning}"))


def _load_model(bundle: Path | None, spec: Path | None) -> tuple[TfliteModel, Manifest]:
    from agent.authoring import spec as specs
    from agent.model.bundle import builtin
    from agent.model.bundle import bundle as bundles
    from agent.model.inference import inference
    from agent.model.sandbox import probe

    if bundle is not None:
        found = bundles.read(builtin.resolve_path(bundle), None)
        probe.probe(found).raise_for_failure()
        return inference.load_model(found.manifest, found.model_bytes), found.manifest
    assert spec is not None
    wanted = specs.read(spec)
    file = spec.parent / wanted.model
    draft = specs.to_manifest(spec, wanted)
    try:
        return inference.load_model(draft, file.read_bytes()), draft
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None


@model.command(epilog="Example: outstation model sign exercise --key publisher.key")
@click.argument("bundle", type=_path)
@click.option("--key", "key_file", required=True, type=_path, help="The publisher's key.")
@json_option
def sign(bundle: Path, key_file: Path, as_json: bool) -> None:
    """Sign a bundle folder, after checking that its files are what its manifest says."""
    from agent.model.bundle import bundle as bundles

    if not bundle.is_dir():
        raise UsageError(f"{bundle}: {'sign the folder, then zip it' if bundle.exists() else 'no such folder'}")
    key = keys.load_private(key_file)
    found = bundles.read(bundle, None)
    (bundle / "manifest.jws").write_bytes(bundles.sign(found.files["manifest.json"], key))
    document = {"bundle": str(bundle), "digest": found.digest, "thumbprint": key.public.kid}
    emit(document, as_json, lambda: click.echo(f"{bundle} {found.digest}\nsigned by {key.public.kid}"))


@model.command(epilog="Example: outstation model check exercise --key publisher.key.pub")
@click.argument("bundle", type=_path)
@click.option("--key", "public", help="The publisher's public key, as text or in a file.")
@json_option
def check(bundle: Path, public: str | None, as_json: bool) -> None:
    """Signature, hashes, load in a child process, golden vectors of BUNDLE, or of the one that ships by that name."""
    document = _check_bundle(bundle, public)
    emit(document, as_json, lambda: _print(document))
    if not document["ok"]:
        sys.exit(1)


def _check_bundle(path: Path, public: str | None) -> dict[str, Any]:
    from agent.model import activation
    from agent.model.bundle import builtin
    from agent.model.bundle import bundle as bundles
    from agent.model.sandbox import probe

    path = builtin.resolve_path(path)
    members = ("name", "version", "digest", "runtime")
    document: dict[str, Any] = {"ok": False, **dict.fromkeys(members), "checks": []}

    def add_check(name: str, ok: bool, detail: str) -> None:
        document["checks"].append({"name": name, "ok": ok, "detail": detail})

    trusted = [keys.load_public(public)] if public else None
    try:
        found = bundles.read(path, trusted)
    except BadBundle as problem:
        add_check("signature and hashes", False, str(problem))
        return document
    add_check("signature", *trust.check_signature(path, found, trusted))
    add_check("hashes", True, f"{len(found.manifest.files)} files as the manifest says")
    report = probe.probe(found)
    for one in report.checks:
        add_check(*one)
    add_check("reference", *_check_reference(lambda: activation.read_reference(found)))
    document |= {"name": found.manifest.name, "version": found.manifest.version, "digest": found.digest}
    document |= {"runtime": report.runtime or None, "ok": all(check["ok"] for check in document["checks"])}
    return document


def _check_reference(load: Callable[[], Reference | None]) -> tuple[bool, str]:
    try:
        reference = load()
    except BadBundle as problem:
        return False, str(problem)
    if reference is None:
        return True, "none: devices will not watch this model for drift"
    return True, f"{reference.drift_windows} drift windows" + (f"; {reference.warning}" if reference.warning else "")


def _print(document: dict[str, Any]) -> None:
    click.echo(f"{document['name'] or 'bundle'} {document['version'] or ''} {document['digest'] or ''}".strip())
    for one in document["checks"]:
        mark = click.style("ok    ", fg="green") if one["ok"] else click.style("failed", fg="red")
        click.echo(f"{mark}  {one['name']}: {one['detail']}")
