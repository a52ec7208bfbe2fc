"""`outstation model …`: keys, packing, signing and checking from the command line."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from outstation.__main__ import main
from outstation.foundation.errors import BadBundle, UsageError
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.protocol.wire import keys
from outstation.workbench.cli.model.group import model as command
from scripts.kit.bundles import KEY, change, model, packed, write_spec


def folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def run(*args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])


def checks(result: Result) -> dict[str, tuple[bool, str]]:
    """Name → (ok, detail) of `check --json`."""
    document = json.loads(result.output)
    assert set(document) == {"ok", "name", "version", "digest", "runtime", "checks"}
    assert all(set(entry) == {"name", "ok", "detail"} for entry in document["checks"])
    assert document["ok"] == all(entry["ok"] for entry in document["checks"]) == (result.exit_code == 0)
    return {entry["name"]: (entry["ok"], entry["detail"]) for entry in document["checks"]}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("original")).parent


@pytest.fixture
def made(original: Path, tmp_path: Path) -> Path:
    """A bundle folder, with its SPEC and what that names in the folder around it."""
    return Path(shutil.copytree(original, tmp_path / "made")) / "bundle"


def test_a_key_is_made_a_bundle_packed_and_checked_from_the_command_line(tmp_path: Path) -> None:
    key = tmp_path / "publisher.key"
    output = json.loads(run("keygen", key, "--json").output)
    assert output["key"] == keys.load_private(key).public.text
    spec = write_spec(folder(tmp_path, "source"))
    done = json.loads(run("pack", spec, "-o", tmp_path / "tiny", "--sign-with", key, "--json").output)
    assert done["warnings"] == []
    result = run("check", tmp_path / "tiny", "--publisher", f"{key}.pub", "--json")
    document = json.loads(result.output)
    assert result.exit_code == 0
    assert (document["name"], document["version"], document["runtime"]) == ("tiny", "1.0.0", runtime_name())
    assert document["digest"] == done["digest"]
    assert list(checks(result)) == ["signature", "hashes", "load", "shapes", "batch", "golden", "reference"]
    assert checks(result)["signature"] == (True, f"by {output['thumbprint']}")


def test_a_person_reads_the_same_in_lines(made: Path) -> None:
    result = run("check", made, "--publisher", KEY.public.text)
    lines = result.output.splitlines()
    assert lines[0].startswith("tiny 1.0.0 sha256:")
    assert [line.split(":")[0] for line in lines[1:]] == [
        f"ok       {name}" for name in ("signature", "hashes", "load", "shapes", "batch", "golden", "reference")
    ]
    assert f"{made} sha256:" in run("pack", made.parent / "bundle.toml", "-o", made).output
    assert f"signed by {KEY.public.kid}" in run("sign", made, "--sign-with", key_file(made.parent)).output


def key_file(folder: Path) -> Path:
    path = folder / "publisher.key"
    path.write_bytes(KEY.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def test_without_a_key_the_signature_is_only_claimed(made: Path) -> None:
    ok, detail = checks(run("check", made, "--json"))["signature"]
    assert ok
    assert detail == f"claims {KEY.public.kid}, not verified: give the publisher's public key with --publisher"


def test_the_wrong_key_fails_the_check_and_what_it_says_is_not_believed(made: Path) -> None:
    other = keys.generate(made.parent / "other.key")
    result = run("check", made, "--publisher", other.public.text, "--json")
    assert result.exit_code == 1
    assert "unknown key" in checks(result)["signature and hashes"][1]
    document = json.loads(result.output)
    assert (document["name"], document["digest"], document["runtime"]) == (None, None, None)


def test_usage_errors_exit_with_2_and_failures_with_1_in_one_line(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (made / "model.tflite").write_bytes(b"")
    for arguments, code in (
        (["pack", str(made / "no.toml"), "-o", str(made)], 2),
        (["sign", str(made), "--sign-with", str(made / "no.key")], 2),
        (["sign", str(made), "--sign-with", str(key_file(made.parent))], 1),
        (["check", str(made)], 1),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["model", *arguments])
        assert ended.value.code == code
        output = capsys.readouterr()
        assert output.err.count("\n") == (arguments[0] != "check")
        assert "Traceback" not in output.err + output.out


def test_a_key_that_is_none_is_wrong_use(made: Path) -> None:
    result = run("check", made, "--publisher", "nonsense")
    assert isinstance(result.exception, UsageError)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "not signed; sign it with `outstation model sign`"),
        (b"nothing of the kind", "manifest.jws is none; sign it with `outstation model sign`"),
    ],
)
def test_an_unsigned_bundle_fails_the_check_and_the_rest_is_checked(
    made: Path, content: bytes | None, why: str
) -> None:
    (made / "manifest.jws").unlink()
    if content is not None:
        (made / "manifest.jws").write_bytes(content)
    result = checks(run("check", made, "--json"))
    assert result["signature"] == (False, why)
    assert result["golden"][0]


def test_a_bundle_that_claims_to_be_the_shipped_one_is_verified_against_it(made: Path) -> None:
    shutil.copy(builtin.bundles_dir() / "exercise" / "manifest.jws", made)
    ok, detail = checks(run("check", made, "--json"))["signature"]
    assert not ok
    assert "bad signature" in detail
    ok, detail = checks(run("check", builtin.bundles_dir() / "exercise", "--json"))["signature"]
    assert ok
    assert detail == f"by {builtin.publisher_keys()[0].kid}"


def test_a_shipped_bundle_is_located_by_its_unused_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checks(run("check", "exercise", "--json"))["signature"] == (True, f"by {builtin.publisher_keys()[0].kid}")
    assert "no such bundle" in checks(run("check", "recordings", "--json"))["signature and hashes"][1]
    folder(tmp_path, "exercise")
    assert "no manifest.json" in checks(run("check", "exercise", "--json"))["signature and hashes"][1]


@pytest.mark.parametrize(
    ("spoil", "name", "why"),
    [
        ("altered", "signature and hashes", "model.tflite was altered"),
        ("not there", "signature and hashes", "no such bundle"),
        ("no zip", "signature and hashes", "is no bundle, which is a folder or a .zip"),
        ("no reference", "reference", "devices will not monitor this model for drift"),
    ],
)
def test_errors_of_a_bundle_are_exact(made: Path, spoil: str, name: str, why: str) -> None:
    path = made
    if spoil == "altered":
        (made / "model.tflite").write_bytes(model("classify_uint8"))
    elif spoil == "not there":
        path = made / "nowhere"
    elif spoil == "no zip":
        path = made / "MODEL_CARD.md"
    else:
        change(made.parent / "bundle.toml", 'reference = "reference.csv"', "")
        assert run("pack", made.parent / "bundle.toml", "-o", made).exit_code == 0
    assert why in checks(run("check", path, "--json"))[name][1]


def test_the_same_content_packed_again_without_a_key_keeps_its_signature(made: Path) -> None:
    before = {file.name: file.read_bytes() for file in made.iterdir()}
    spec = made.parent / "bundle.toml"
    assert json.loads(run("pack", spec, "-o", made, "--json").output)["warnings"] == []
    assert {file.name: file.read_bytes() for file in made.iterdir()} == before
    change(spec, 'version = "1.0.0"', 'version = "1.0.1"')
    assert "not signed" in run("pack", spec, "-o", made).output
    assert not (made / "manifest.jws").exists()


def test_a_lone_signature_in_the_way_is_no_reason_to_fail(tmp_path: Path) -> None:
    spec = write_spec(folder(tmp_path, "source"))
    (folder(tmp_path, "out") / "manifest.jws").write_text("left over")
    assert run("pack", spec, "-o", tmp_path / "out").exit_code == 0
    assert not (tmp_path / "out" / "manifest.jws").exists()


def test_signing_replaces_a_signature_and_covers_only_what_is_whole(made: Path) -> None:
    key = key_file(made.parent)
    (made / "manifest.jws").write_text("damaged")
    assert run("sign", made, "--sign-with", key).exit_code == 0
    assert bundle.read(made, [KEY.public]).signer == KEY.public.kid
    (made / "DATA_CARD.md").write_text("changed")
    assert isinstance(run("sign", made, "--sign-with", key).exception, BadBundle)


def test_only_a_folder_is_signed(made: Path) -> None:
    key = key_file(made.parent)
    zipped = made.parent / "bundle.zip"
    with zipfile.ZipFile(zipped, "w") as out:
        out.write(made / "manifest.json", "manifest.json")
    for path, why in ((zipped, "sign the folder, then zip it"), (made / "nowhere", "no such folder")):
        result = run("sign", path, "--sign-with", key)
        assert isinstance(result.exception, UsageError)
        assert why in str(result.exception)


def test_a_key_is_needed_to_sign_and_must_be_one(made: Path) -> None:
    assert run("sign", made).exit_code == 2
    assert isinstance(run("sign", made, "--sign-with", made / "MODEL_CARD.md").exception, UsageError)
    assert isinstance(run("keygen", made / "manifest.json").exception, UsageError)


def test_a_reference_is_made_for_the_model_of_a_spec_or_of_a_bundle(made: Path, tmp_path: Path) -> None:
    packed_one = (made / "reference.json").read_bytes()
    spec = made.parent / "bundle.toml"
    for source in (("--spec", spec), ("--bundle", made)):
        out = tmp_path / f"{source[0][2:]}.json"
        done = run("reference", made.parent / "reference.csv", *source, "-o", out, "--json")
        assert done.exit_code == 0, done.output
        document = json.loads(done.output)
        assert document["windows"] >= 20
        assert out.read_bytes() == packed_one
    refused = run("reference", spec, "-o", tmp_path / "none.json").exception
    assert isinstance(refused, UsageError)
    assert "give one of --bundle and --spec" in str(refused)
