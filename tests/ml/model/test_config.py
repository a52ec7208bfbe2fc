"""`model config`: the printed sections run the bundle's task over a matching stream."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from outstation.device import config
from outstation.device.bootstrap import tasks
from outstation.device.cli.init import init
from outstation.foundation import media
from outstation.foundation.errors import BadBundle, UsageError
from outstation.foundation.media import ImageFormat, SoundFormat
from outstation.ml.model.bundle import bundle
from outstation.ml.model.bundle.manifest import ModelInput, WindowSpec
from outstation.workbench.cli.model.group import model as command
from outstation.workbench.testing.messages import new_key
from scripts.kit.bundles import CLASSIFY, KEY, change_manifest, packed


def print_config(*args: object) -> str:
    result = CliRunner().invoke(command, ["config", *(str(arg) for arg in args)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return packed(tmp_path, CLASSIFY)


def test_the_printed_sections_make_a_device_that_runs_the_bundle(tmp_path: Path, tiny: Path) -> None:
    assert CliRunner().invoke(init, [str(tmp_path / "pi"), "--id", "pi-07"]).exit_code == 0
    file = tmp_path / "pi" / "outstation.toml"
    text = print_config(tiny, "--name", "v1.sorter", "--publisher", KEY.public.text)
    file.write_text(file.read_text() + text)
    conf = config.load(file)
    task = tasks.load_task(file, conf, None, "v1.sorter")
    assert task.bundle.manifest.name == "tiny"
    assert [field.name for field in conf.streams["v1.sorter"].fields] == list(CLASSIFY.fields)
    assert (
        json.loads(print_config(tiny, "--name", "v1.sorter", "--publisher", KEY.public.text, "--json"))["text"] == text
    )


def test_a_key_that_did_not_sign_it_is_not_written(tiny: Path) -> None:
    with pytest.raises(BadBundle):
        print_config(tiny, "--publisher", new_key(5).public.text)


@pytest.mark.parametrize(
    "made",
    [
        ImageFormat(width=8, height=6, scale=0.5, offset=-1.0),
        SoundFormat(rate=16000, window=64, hop=32, mels=8, scale="htk"),
    ],
)
def test_a_bundle_of_media_gets_a_folder_with_the_same_definition(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, made: media.MediaFormat
) -> None:
    image, sound = (made, None) if isinstance(made, ImageFormat) else (None, made)
    window = WindowSpec(rows=6, step=6, max_gap_s=1.0)
    spec = ModelInput(fields=made.columns, window=window, image=image, sound=sound)
    result = bundle.read(tiny, None)
    other = replace(result, manifest=msgspec.structs.replace(result.manifest, input=spec))
    monkeypatch.setattr(bundle, "read", lambda path, keys: other)
    file = tmp_path / "outstation.toml"
    file.write_text('[device]\nid = "a"\nfleet = "b"\n' + print_config(tiny))
    assert config.load(file).streams["tiny"].media_format == made


def test_too_many_fields_for_a_stream_are_one_error(tiny: Path) -> None:
    change_manifest(tiny, lambda head: head["input"].update(fields=[f"x{i}" for i in range(640)]))
    with pytest.raises(UsageError, match="needs 640 fields, a stream has 256 at most; pack it with a window"):
        print_config(tiny)
    with pytest.raises(UsageError, match="--name A B: must be 1-64"):
        print_config(tiny, "--name", "A B")
