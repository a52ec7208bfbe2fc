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
    from agent.model.bundle.manifest import Input

_path = click.Path(path_type=Path)


@click.command("config", epilog="Example: outstation model config theirs --key publisher.key.pub >> outstation.toml")
@click.argument("bundle", type=_path)
@click.option("--name", help="Of stream and task; default the bundle's name.")
@click.option("--key", "public", help="The publisher's public key, text or file, for [publishers]; it is verified.")
@json_option
def config_of(bundle: Path, name: str | None, public: str | None, as_json: bool) -> None:
    """A stream and a task for BUNDLE, as sections of a device's config."""
    from agent.model.bundle import bundle as bundles

    key = keys.load_public(public) if public else None
    found = bundles.read(bundle, [key] if key else None)
    name = name or found.manifest.name
    if not is_name(name):
        raise UsageError(f"--name {name}: must be 1-64 of a-z 0-9 . _ - and start with a letter or digit")
    lines = ["", f'[publishers]\nkeys = ["{key.text}"]'] if key else [""]
    lines += [f"[streams.{_key(name)}]", _stream(bundle, name, found.manifest.input)]
    lines += [f"[tasks.{_key(name)}]", f"stream = {_text(name)}", f"bundle = {_text(str(bundle.resolve()))}"]
    text = "\n".join(lines) + "\n"
    emit({"text": text}, as_json, lambda: click.echo(text, nl=False))


def _stream(bundle: Path, name: str, spec: Input) -> str:
    if (made := spec.image or spec.sound) is not None:
        return f'source = {{ kind = "files", folder = {_text(name)}, {media.written(made)} }}'
    if len(spec.fields) > config.MOST_FIELDS:
        raise UsageError(
            f"{bundle}: takes {len(spec.fields)} fields, a stream has {config.MOST_FIELDS} at most; pack it with a "
            "window of rows of fewer fields, or with image or sound"
        )
    units = spec.units or [""] * len(spec.fields)
    fields = [
        f"  {{ name = {_text(field)}{f', unit = {_text(unit)}' if unit else ''} }},"
        for field, unit in zip(spec.fields, units, strict=True)
    ]
    return "\n".join(["fields = [", *fields, "]"])


def _key(name: str) -> str:
    """Quoted where a dot would mean another section."""
    return _text(name) if "." in name else name


def _text(value: str) -> str:
    """JSON's strings are TOML's."""
    return json.dumps(value, ensure_ascii=False)
