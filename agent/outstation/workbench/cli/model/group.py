"""Command group `outstation model`: make, sign and check bundles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from outstation.foundation import input_files
from outstation.foundation.cli.groups import SentenceGroup
from outstation.foundation.cli.options import PATH, json_option, require_clean_option
from outstation.foundation.cli.output import NOT_CLEAN, echo, echo_styled, emit, require_writable, write_output
from outstation.foundation.errors import BadBundle, UsageError
from outstation.foundation.text import pluralize, printable
from outstation.protocol.wire import keys
from outstation.workbench.cli.model import trust
from outstation.workbench.cli.model.config import config_command
from outstation.workbench.cli.model.evaluate import evaluate
from outstation.workbench.cli.model.features import features_command
from outstation.workbench.cli.model.run import join_option, run

if TYPE_CHECKING:
    from outstation.ml.model.bundle.manifest import Manifest
    from outstation.ml.model.inference.runtime import TfliteModel
    from outstation.workbench.authoring.training_check import CheckedData

_NO_REFERENCE = "none: devices will not monitor this model for drift"


@click.group(cls=SentenceGroup)
def model() -> None:
    """Make, check and run bundles: a model with labels, drift reference, golden vectors and cards, signed."""


model.add_command(run)
model.add_command(evaluate)
model.add_command(config_command)
model.add_command(features_command)


@model.command(epilog="Example: outstation model keygen publisher.key")
@click.argument("file", type=PATH)
@json_option
def keygen(file: Path, as_json: bool) -> None:
    """Generate a publisher's key; devices trust its public half from [publishers] keys."""
    key = keys.generate(file).public
    document = {"file": str(file), "key": key.text, "thumbprint": key.kid}
    emit(document, as_json, lambda: echo(f"{file} written, mode 0600\nkey         {key.text}\nthumbprint  {key.kid}"))


@model.command(epilog="Example: outstation model pack bundle.toml -o exercise --sign-with publisher.key")
@click.argument("spec", type=PATH, required=False)
@click.option("-o", "--out", type=PATH, help="Folder or .zip of the bundle; with --from the SPEC to write.")
@click.option("--sign-with", "key_file", type=PATH, help="Publisher's key; without it the bundle stays unsigned.")
@click.option("--from", "tflite", type=PATH, help="Write a SPEC to complete for this .tflite instead.")
@click.option("--data", type=PATH, help="With --from: CSV, JSON Lines or Parquet of the model's fields.")
@click.option("--train", type=PATH, metavar="DATA", help="Labelled training data, to look for poisoning.")
@require_clean_option
@json_option
def pack(
    spec: Path | None,
    out: Path | None,
    key_file: Path | None,
    tflite: Path | None,
    data: Path | None,
    train: Path | None,
    require_clean: bool,
    as_json: bool,
) -> None:
    """Make a bundle from SPEC, with warnings of what it lacks; with --from, make a SPEC from a model.

    Labelled data of the SPEC, and those of --train, are checked for flipped labels, triggers, copies, and for devices
    and labellers (columns of these names) that contradict the others.
    """
    from outstation.workbench.authoring import pack as packing
    from outstation.workbench.authoring import scaffold

    if tflite is not None:
        if spec is not None or key_file is not None or train is not None or require_clean:
            raise UsageError("--from writes a SPEC and packs nothing; complete the SPEC, then pack that")
        draft = scaffold.scaffold_spec(tflite, out, data)
        if out is not None:
            scaffold.write_spec(draft, out)
        text = f"{out} written, kind {draft.kind}: {draft.rationale}. Check every line of it.\n" if out else draft.text
        members = {"spec": str(out) if out else None, "kind": draft.kind, "text": draft.text}
        emit(members | {"warnings": draft.warnings}, as_json, lambda: echo(text, nl=False))
        if not as_json:
            for warning in draft.warnings:
                click.echo(f"warning: {printable(warning)}", err=True)
        return
    if spec is None or out is None or data is not None:
        raise UsageError(
            "give SPEC and -o, the bundle to make; or --from MODEL.tflite, and --data if there is some, for a SPEC"
        )
    packed = packing.pack(spec, keys.load_private(key_file) if key_file else None, train)
    # A clean held-out set says nothing about training data that could not be checked.
    passed = bool(packed.training) and all(each.report.state == "passed" for each in packed.training)
    refused = require_clean and not passed
    if not refused:
        # The same content needs no new signature, so that every reader can rebuild and compare.
        if key_file is None:
            packing.reuse_signature(packed, out)
        packing.write_bundle(packed, out)
    members = msgspec.structs.asdict(packed)
    document = {"bundle": None if refused else str(out)}
    document |= {name: members[name] for name in ("digest", "warnings", "notes", "training")}
    head = f"{out} not written: {NOT_CLEAN}" if refused else f"{out} {packed.digest}"
    lines = [head, *packed.notes, *_training_lines(packed.training), *(f"warning: {w}" for w in packed.warnings)]
    emit(document, as_json, lambda: echo("\n".join(map(printable, lines))), passed=not refused)


def _training_lines(training: list[CheckedData]) -> Iterator[str]:
    for each in training:
        warn = "warning: " if each.report.findings else ""
        yield from (f"{warn}{each.file}: {line}" for line in each.report.describe())


@model.command("reference", epilog="Example: outstation model reference quiet.npz --spec bundle.toml -o reference.json")
@click.argument("data", type=PATH)
@click.option("--bundle", type=PATH, help="Bundle whose model the reference is for.")
@click.option("--spec", type=PATH, help="SPEC whose model the reference is for.")
@join_option
@click.option("-o", "--out", required=True, type=PATH, help="File to write.")
@json_option
def make_reference(
    data: Path, bundle: Path | None, spec: Path | None, joined: dict[str, Path], out: Path, as_json: bool
) -> None:
    """Make a drift reference from DATA without drift, in the order they were recorded."""
    from outstation.workbench.authoring import pack as packing

    if (bundle is None) == (spec is None):
        raise UsageError("give one of --bundle and --spec: a reference is made for a model")
    model, draft, own, parts = _load_model(bundle, spec)
    require_writable(out, [*filter(None, (data, bundle, spec)), *parts, *own.values(), *joined.values()])
    reference = packing.build_reference(data, model, draft, {**own, **joined})
    write_output(out, reference.to_json())
    windows, warning = reference.drift_windows, reference.warning
    document = {"file": str(out), "digest": reference.digest, "windows": windows, "warning": warning}
    text = f"{out} {reference.digest}, {windows} drift windows" + (f"\nwarning: {warning}" if warning else "")
    emit(document, as_json, lambda: echo(text))


def _load_model(
    bundle: Path | None, spec: Path | None
) -> tuple[TfliteModel, Manifest, dict[str, Path], Iterable[Path]]:
    """Return the model, its manifest, the files of further inputs that a SPEC names, and the files it is read from."""
    from outstation.ml.model.bundle import builtin
    from outstation.ml.model.bundle import bundle as bundles
    from outstation.ml.model.inference import runtime
    from outstation.ml.model.sandbox import probe
    from outstation.workbench.authoring import spec as specs

    if bundle is not None:
        loaded = bundles.read(builtin.resolve_path(bundle), None)
        probe.probe(loaded).raise_for_failure()
        parts = bundle.iterdir() if bundle.is_dir() else []
        return runtime.load_model(loaded.manifest, loaded.model_bytes), loaded.manifest, {}, parts
    assert spec is not None
    settings = specs.read(spec)
    file = spec.parent / settings.model
    draft = specs.to_manifest(spec, settings)
    own = {name: spec.parent / each.data for name, each in settings.inputs.items() if each.data}
    return runtime.load_model(draft, input_files.read_input(file)), draft, own, [file]


@model.command(epilog="Example: outstation model sign exercise --sign-with publisher.key")
@click.argument("bundle", type=PATH)
@click.option("--sign-with", "key_file", required=True, type=PATH, help="Publisher's key.")
@json_option
def sign(bundle: Path, key_file: Path, as_json: bool) -> None:
    """Sign a bundle folder, after checking its files against its manifest."""
    from outstation.ml.model.bundle import bundle as bundles

    if not bundle.is_dir():
        raise UsageError(f"{bundle}: {'sign the folder, then zip it' if bundle.exists() else 'no such folder'}")
    key = keys.load_private(key_file)
    loaded = bundles.read(bundle, None)
    digest = loaded.digest
    (bundle / "manifest.jws").write_bytes(bundles.MANIFEST_DOMAIN.sign_file(key, loaded.files["manifest.json"]))
    document = {"bundle": str(bundle), "digest": digest, "thumbprint": key.public.kid}
    emit(document, as_json, lambda: echo(f"{bundle} {digest}\nsigned by {key.public.kid}"))


@model.command(epilog="Example: outstation model check exercise --publisher publisher.key.pub")
@click.argument("bundle", type=PATH)
@click.option("--publisher", "public", help="Publisher's public key, as text or in a file.")
@json_option
def check(bundle: Path, public: str | None, as_json: bool) -> None:
    """Check BUNDLE, a path or the name of a built-in bundle: signature, hashes, golden vectors in a child process."""
    document = _check_bundle(bundle, public)
    title = f"{document['name'] or 'bundle'} {document['version'] or ''} {document['digest'] or ''}".strip()
    lines = [printable(title), *(_format_check(**entry) for entry in document["checks"])]
    emit(document, as_json, lambda: echo_styled("\n".join(lines)), passed=document["ok"])


def _format_check(name: str, ok: bool, detail: str) -> str:
    mark = click.style("ok     ", fg="green") if ok else click.style("failed ", fg="red")
    if ok and name == "signature" and detail.startswith(trust.UNVERIFIED):
        mark = click.style("warning", fg="yellow")
    return f"{mark}  {name}: {printable(detail)}"


def _check_bundle(path: Path, public: str | None) -> dict[str, Any]:
    from outstation.ml.model import activation
    from outstation.ml.model.bundle import builtin
    from outstation.ml.model.bundle import bundle as bundles
    from outstation.ml.model.sandbox import probe

    path = builtin.resolve_path(path)
    members = ("name", "version", "digest", "runtime")
    document: dict[str, Any] = {"ok": False, **dict.fromkeys(members), "checks": []}

    def add_check(name: str, ok: bool, detail: str) -> None:
        document["checks"].append({"name": name, "ok": ok, "detail": detail})

    trusted = [keys.load_public(public)] if public else None
    try:
        bundle = bundles.read(path, trusted)
    except BadBundle as problem:
        add_check("signature and hashes", False, str(problem))
        return document
    add_check("signature", *trust.check_signature(path, bundle, trusted))
    add_check("hashes", True, f"{pluralize(len(bundle.manifest.files), 'file')} as in the manifest")
    report = probe.probe(bundle)
    for result in report.checks:
        add_check(*result)
    try:
        reference = activation.read_reference(bundle)
        warning = f"; {reference.warning}" if reference and reference.warning else ""
        summary = f"{reference.drift_windows} drift windows{warning}" if reference else _NO_REFERENCE
        add_check("reference", True, summary)
    except BadBundle as problem:
        add_check("reference", False, str(problem))
    document |= {"name": bundle.manifest.name, "version": bundle.manifest.version, "digest": bundle.digest}
    document |= {"runtime": report.runtime or None, "ok": all(check["ok"] for check in document["checks"])}
    return document
