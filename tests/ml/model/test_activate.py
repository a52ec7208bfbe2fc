"""From a name in the config to a model that may run: found, verified, probed, loaded, or refused with the reason."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from outstation.foundation.errors import BadBundle
from outstation.ml.model import activation
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.sandbox import probe
from outstation.workbench.testing.messages import new_key
from scripts.kit.bundles import ANOMALY, KEY, Recipe, archive, change_manifest, packed

FOREIGN = new_key(12)


@pytest.fixture(scope="module")
def anomaly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("anomaly"), ANOMALY)


def test_a_name_is_looked_up_in_the_device_then_among_the_shipped(folder: Path) -> None:
    store = folder.parent
    assert builtin.locate_bundle("bundle", store) == folder
    assert builtin.locate_bundle("./here", store) == Path("here")
    assert builtin.locate_bundle("exercise", store) == builtin.bundles_dir() / "exercise"
    zipped = archive(folder)
    shutil.rmtree(folder)
    assert builtin.locate_bundle("bundle", store) == zipped
    with pytest.raises(BadBundle, match=r"no bundle 'nowhere' in .*; put it there, or give its path"):
        builtin.locate_bundle("nowhere", store)


def test_a_bundle_that_proves_itself_is_loaded_with_its_reference(folder: Path) -> None:
    active = activation.activate(folder, [KEY.public])
    assert active.model.outputs == 3
    assert active.reference is not None
    assert active.reference.fields == ("a", "b", "c", "d")


def test_a_shipped_bundle_is_trusted_without_being_configured() -> None:
    assert activation.activate(builtin.bundles_dir() / "exercise", []).bundle.manifest.name == "exercise"


def test_a_foreign_bundle_is_not_activated(folder: Path) -> None:
    with pytest.raises(BadBundle, match="unknown key"):
        activation.activate(folder, [FOREIGN.public])


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("model.tflite", b"no model", "load: "),
        ("golden.npz", b"no vectors", "golden: golden.npz is damaged"),
        ("reference.json", b"{}", "reference.json is malformed"),
    ],
)
def test_a_signed_bundle_that_does_not_work_is_not_activated(folder: Path, name: str, content: bytes, why: str) -> None:
    replace_file(folder, name, content)
    with pytest.raises(BadBundle) as problem:
        activation.activate(folder, [KEY.public])
    assert str(problem.value).startswith(f"{folder}: {why}")


def test_a_reference_made_for_another_model_is_not_activated(folder: Path, anomaly: Path) -> None:
    replace_file(folder, "reference.json", (anomaly / "reference.json").read_bytes())
    with pytest.raises(BadBundle, match="made for other fields, labels, window rows than the manifest"):
        activation.activate(folder, [KEY.public])


def replace_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    change_manifest(folder, lambda head: head["files"].update({name: digest}))


def test_a_recipe_without_a_reference_is_activated_without_one(tmp_path: Path) -> None:
    path = packed(tmp_path, Recipe("regress", "regress_int8"))
    assert activation.read_reference(bundle.read(path, None)) is not None
    (path / "reference.json").unlink()
    change_manifest(path, lambda head: head["files"].pop("reference.json"))
    assert activation.activate(path, [KEY.public]).reference is None


def test_a_proven_bundle_is_probed_again_only_after_a_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[str] = []
    real = probe.probe

    def counted(content: Bundle, *options: Any) -> probe.ProbeReport:
        probed.append(content.digest)
        return real(content, *options)

    monkeypatch.setattr(probe, "probe", counted)
    first = activation.activate(folder, [KEY.public])
    assert first.tuning is not None
    again = activation.activate(folder, [KEY.public], [first.tuning])
    assert (len(probed), again.tuning) == (1, first.tuning)
    for changed in (
        {"machine": "another"},
        {"runtime": "another"},
        {"verified_for": ""},
        {"verified_for": f"{probed[0]} 0.0.1"},
    ):
        activation.activate(folder, [KEY.public], [replace(first.tuning, **changed)])
    assert len(probed) == 5
    # The same model in a bundle that says something else of it.
    change_manifest(folder, lambda head: head.update(version="2"))
    activation.activate(folder, [KEY.public], [first.tuning])
    assert len(probed) == 6
    assert len(set(probed)) == 2
