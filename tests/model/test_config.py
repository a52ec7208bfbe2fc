"""`model config`: what it prints is a config in which the bundle's task runs over a stream that fits."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from agent import config, media
from agent.bootstrap import tasks
from agent.cli.device.init import init
from agent.cli.model.group import model as command
from agent.errors import BadBundle, UsageError
from agent.media import ImageFormat, SoundFormat
from agent.model.bundle import bundle
from agent.model.bundle.manifest import ModelInput, WindowSpec
from agent.testing.messages import new_key
from scripts.kit.bundles import CLASSIFY, KEY, change_manifest, packed


def told(*args: object) -> str:
    found = CliRunner().invoke(command, ["config", *(str(arg) for arg in args)], catch_exceptions=False)
    assert found.exit_code == 0
    return found.stdout


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return packed(tmp_path, CLASSIFY)


def test_what_is_printed_makes_the_config_of_a_device_that_runs_the_bundle(tmp_path: Path, tiny: Path) -> None:
    assert CliRunner().invoke(init, [str(tmp_path / "pi"), "--id", "pi-07"]).exit_code == 0
    file = tmp_path / "pi" / "outstation.toml"
    text = told(tiny, "--name", "v1.sorter", "--key", KEY.public.text)
    file.write_text(file.read_text() + text)
    conf = config.load(file)
    task = tasks.load_task(file, conf, None, "v1.sorter")
    assert task.bundle.manifest.name == "tiny"
    assert [field.name for field in conf.streams["v1.sorter"].fields] == list(CLASSIFY.fields)
    assert json.loads(told(tiny, "--name", "v1.sorter", "--key", KEY.public.text, "--json"))["text"] == text


def test_a_key_that_did_not_sign_it_is_not_written(tiny: Path) -> None:
    with pytest.raises(BadBundle):
        told(tiny, "--key", new_key(5).public.text)


@pytest.mark.parametrize(
    "made",
    [
        ImageFormat(width=8, height=6, scale=0.5, offset=-1.0),
        SoundFormat(rate=16000, window=64, hop=32, mels=8, scale="htk"),
    ],
)
def test_a_bundle_of_images_or_sounds_gets_a_folder_with_the_same_definition(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, made: media.MediaFormat
) -> None:
    image, sound = (made, None) if isinstance(made, ImageFormat) else (None, made)
    window = WindowSpec(rows=6, step=6, max_gap_s=1.0)
    spec = ModelInput(fields=made.columns, window=window, image=image, sound=sound)
    found = bundle.read(tiny, None)
    other = replace(found, manifest=msgspec.structs.replace(found.manifest, input=spec))
    monkeypatch.setattr(bundle, "read", lambda path, keys: other)
    file = tmp_path / "outstation.toml"
    file.write_text('[device]\nid = "a"\nfleet = "b"\n' + told(tiny))
    assert config.load(file).streams["tiny"].media_format == made


def test_more_fields_than_a_stream_has_are_named_with_what_to_do(tiny: Path) -> None:
    change_manifest(tiny, lambda head: head["input"].update(fields=[f"x{i}" for i in range(640)]))
    with pytest.raises(UsageError, match="needs 640 fields, a stream has 256 at most; pack it with a window"):
        told(tiny)
    with pytest.raises(UsageError, match="--name A B: must be 1-64"):
        told(tiny, "--name", "A B")
