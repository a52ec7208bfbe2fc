"""`outstation model config`: what a device's config needs for a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent import config, media
from agent.cli.output import emit, json_option
from agent.errors import UsageError
from agent.names import is_name
from agent.wire import keys

if TYPE_CHECKING:
    from agent.model.bundle.manifest import ModelInput

_path = click.Path(path_type=Path)


@click.command("config", epilog="Example: outstation model config theirs --key publisher.key.pub >> outstation.toml")
@click.argument("bundle", type=_path)
@click.option("--name", help="Of stream and task; default the bundle's name.")
@click.option("--key", "public", help="The publisher's public key, text or file, for [publishers]; it is verified.")
@json_option
def config_command(bundle: Path, name: str | None, public: str | None, as_json: bool) -> None:
    """A stream and a task for BUNDLE, as sections of a device's config."""
    from agent.model.bundle import bundle as bundles

    key = keys.load_public(public) if public else None
    found = bundles.read(bundle, [key] if key else None)
    name = name or found.manifest.name
    if not is_name(name):
        raise UsageError(f"--name {name}: must be 1-64 of a-z 0-9 . _ - and start with a letter or digit")
    lines = ["", f'[publishers]\nkeys = ["{key.text}"]'] if key else [""]
    lines += [f"[streams.{_toml_key(name)}]", _format_stream(bundle, name, found.manifest.input)]
    lines += [
        f"[tasks.{_toml_key(name)}]",
        f"stream = {_toml_string(name)}",
        f"bundle = {_toml_string(str(bundle.resolve()))}",
    ]
    text = "\n".join(lines) + "\n"
    emit({"text": text}, as_json, lambda: click.echo(text, nl=False))


def _format_stream(bundle: Path, name: str, spec: ModelInput) -> str:
    if (made := spec.image or spec.sound) is not None:
        return f'source = {{ kind = "files", folder = {_toml_string(name)}, {media.to_toml(made)} }}'
    if len(spec.fields) > config.MAX_FIELDS:
        raise UsageError(
            f"{bundle}: takes {len(spec.fields)} fields, a stream has {config.MAX_FIELDS} at most; pack it with a "
            "window of rows of fewer fields, or with image or sound"
        )
    units = spec.units or [""] * len(spec.fields)
    fields = [
        f"  {{ name = {_toml_string(field)}{f', unit = {_toml_string(unit)}' if unit else ''} }},"
        for field, unit in zip(spec.fields, units, strict=True)
    ]
    return "\n".join(["fields = [", *fields, "]"])


def _toml_key(name: str) -> str:
    """Quoted where a dot would mean another section."""
    return _toml_string(name) if "." in name else name


def _toml_string(value: str) -> str:
    """JSON's strings are TOML's."""
    return json.dumps(value, ensure_ascii=False)
