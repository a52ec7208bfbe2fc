"""Command `outstation model features`: what a feature file contains, and the lines that name it in a SPEC."""

from __future__ import annotations

from pathlib import Path

import click

from outstation.foundation.cli.options import PATH, json_option
from outstation.foundation.cli.output import echo, emit
from outstation.foundation.config.toml_files import encode_value


@click.command("features", epilog="Example: outstation model features motion.toml")
@click.argument("file", type=PATH)
@json_option
def features_command(file: Path, as_json: bool) -> None:
    """Check a feature FILE; print name, version, digest and columns, and the line for the SPECs of its bundles."""
    from outstation.ml.model.bundle import feature_set as feature_sets

    feature_set = feature_sets.read(file)
    members = {"file": str(file.name), "version": feature_set.version, "digest": feature_set.digest}
    line = f"features = {{ {', '.join(f'{key} = {encode_value(value)}' for key, value in members.items())} }}"
    document = {
        "name": feature_set.name,
        "version": feature_set.version,
        "digest": feature_set.digest,
        "fields": feature_set.fields,
        "columns": feature_set.columns,
        "history_rows": max((0 if f.is_time_based else f.history_rows for f in feature_set.derived), default=0),
        "spec": line,
    }
    lines = [
        f"{feature_set.name} {feature_set.version} {feature_set.digest}",
        f"fields: {', '.join(feature_set.fields)}",
        f"features: {', '.join(feature_set.columns) or 'none'}; they look back {document['history_rows']} rows",
        f"In [input] of a SPEC: {line}",
    ]
    emit(document, as_json, lambda: echo("\n".join(lines)))
