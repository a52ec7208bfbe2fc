"""Command `outstation model config`: the sections of a device's config for a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from outstation.device import config
from outstation.foundation import media
from outstation.foundation.cli.options import PATH, json_option
from outstation.foundation.cli.output import echo, emit
from outstation.foundation.config.toml_files import encode_key, encode_value
from outstation.foundation.errors import UsageError
from outstation.foundation.names import is_name
from outstation.protocol.wire import keys

if TYPE_CHECKING:
    from outstation.ml.model.bundle.manifest import ModelInput


@click.command(
    "config", epilog="Example: outstation model config mymodel --publisher publisher.key.pub >> outstation.toml"
)
@click.argument("bundle", type=PATH)
@click.option("--name", help="Name of stream and task; default the bundle's name.")
@click.option(
    "--publisher",
    "public",
    help="Publisher's public key, text or file, for [publishers]; the bundle must be signed by it.",
)
@json_option
def config_command(bundle: Path, name: str | None, public: str | None, as_json: bool) -> None:
    """Print a stream and a task for BUNDLE, as sections of a device's config."""
    from outstation.ml.model.bundle import bundle as bundles

    key = keys.load_public(public) if public else None
    manifest = bundles.read(bundle, [key] if key else None).manifest
    name = name or manifest.name
    if not is_name(name):
        raise UsageError(f"--name {name}: must be 1-64 of a-z 0-9 . _ - and start with a letter or digit")
    lines = ["", f'[publishers]\nkeys = ["{key.text}"]'] if key else [""]
    lines += [f"[streams.{encode_key(name)}]", _format_stream(bundle, name, manifest.input)]
    lines += [
        f"[tasks.{encode_key(name)}]",
        f"stream = {encode_value(name)}",
        f"bundle = {encode_value(str(bundle.resolve()))}",
    ]
    for joined, spec in manifest.joined.items():
        lines += [f"[tasks.{encode_key(name)}.inputs.{encode_key(joined)}]", f"stream = {encode_value(joined)}"]
        lines += [f"[streams.{encode_key(joined)}]", _format_fields(spec.fields, spec.units)]
    text = "\n".join(lines) + "\n"
    emit({"text": text}, as_json, lambda: echo(text, nl=False))


def _format_stream(bundle: Path, name: str, spec: ModelInput) -> str:
    if (media_format := spec.image or spec.sound) is not None:
        return f'source = {{ kind = "files", folder = {encode_value(name)}, {media.to_toml(media_format)} }}'
    if len(spec.fields) > config.MAX_FIELDS:
        raise UsageError(
            f"{bundle}: needs {len(spec.fields)} fields, a stream has {config.MAX_FIELDS} at most; pack it with a "
            "window of rows of fewer fields, or with image or sound"
        )
    return _format_fields(spec.fields, spec.units)


def _format_fields(names: list[str], units: list[str]) -> str:
    fields = [
        f"  {{ name = {encode_value(field)}{f', unit = {encode_value(unit)}' if unit else ''} }},"
        for field, unit in zip(names, units or [""] * len(names), strict=True)
    ]
    return "\n".join(["fields = [", *fields, "]"])
