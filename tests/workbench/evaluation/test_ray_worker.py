"""Ray worker without a cluster: its checks of bundle, files and versions, and the errors it returns."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from outstation.__main__ import main
from outstation.foundation.errors import UsageError
from outstation.ml.model.bundle import bundle as bundles
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference import runtime
from outstation.ml.model.inference.inference import Inference
from outstation.workbench.authoring import pack
from outstation.workbench.cli.model.group import model as command
from outstation.workbench.evaluation.predict import output
from outstation.workbench.evaluation.predict.ledger import FileJob
from outstation.workbench.evaluation.predict.ray_worker import Worker, WorkerConfig, WorkerResult
from outstation.workbench.evaluation.predict.run import BatchPredictor
from scripts.kit.bundles import (
    CLASSIFY,
    KEY,
    TABULAR,
    WINDOWED,
    packed,
    readings,
    waves,
    write_csv,
    write_joined_spec,
)
from tests.kit.stations import ROOT

TOKEN = secrets.token_hex(16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("tabular"), CLASSIFY)


@pytest.fixture
def bundle(folder: Path) -> Bundle:
    return bundles.read(folder, None)


@pytest.fixture
def job(bundle: Bundle, tmp_path: Path) -> FileJob:
    (tmp_path / "mark").write_text(TOKEN)
    source = write_csv(tmp_path / "rows.csv", TABULAR, readings(50))
    return work(bundle).make_job(source, tmp_path / "out.csv")


def work(loaded: Bundle) -> BatchPredictor:
    return BatchPredictor(loaded, Inference(loaded.manifest, runtime.load_model(loaded.manifest, loaded.model_bytes)))


def order(loaded: Bundle, folder: Path, **changed: object) -> WorkerConfig:
    sent = {
        "bundle_name": "tiny 1.0.0",
        "files": loaded.files,
        "digest": loaded.digest,
        "raw": False,
        "marker": folder / "mark",
        "token": TOKEN,
    }
    return WorkerConfig(**(sent | changed))  # type: ignore[arg-type]


def answer(loaded: Bundle, job: FileJob, **changed: object) -> WorkerResult:
    return Worker(order(loaded, job.target.parent, **changed)).process(job)


def test_a_file_is_answered_and_nothing_else_is_left(bundle: Bundle, job: FileJob, tmp_path: Path) -> None:
    result = answer(bundle, job)
    assert result.totals is not None
    assert (result.error, result.totals.rows, result.totals.results) == ("", 50, 50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mark", "out.csv", "rows.csv"]


def test_a_bundle_that_was_altered_on_the_way_answers_nothing(bundle: Bundle, job: FileJob) -> None:
    for name in ("model.tflite", "manifest.json"):
        altered = bundle.files | {name: bundle.files[name].replace(b"1", b"2", 1)}
        result = answer(bundle, job, files=altered)
        assert result.totals is None
        assert not result.is_usage_error
        assert not job.target.exists()


def test_another_bundle_than_was_sent_answers_nothing(bundle: Bundle, job: FileJob) -> None:
    result = answer(bundle, job, digest="sha256:" + "0" * 64)
    assert "was sent" in result.error
    assert not job.target.exists()


@pytest.mark.parametrize("changed", [{"agent": "0.0.1"}, {"runtime": "another 9.9"}])
def test_another_version_than_the_drivers_answers_nothing(
    bundle: Bundle, job: FileJob, changed: dict[str, str]
) -> None:
    result = answer(bundle, job, **changed)
    assert (result.totals, result.is_usage_error) == (None, True)
    assert "install the same on all" in result.error


def test_missing_data_are_named_with_the_node(bundle: Bundle, job: FileJob) -> None:
    job.source.unlink()
    result = answer(bundle, job)
    assert (result.totals, result.is_usage_error) == (None, True)
    assert result.error.startswith("node ")
    assert f"{job.source} does not exist" in result.error


@pytest.mark.parametrize(
    ("text", "why"), [(None, "does not exist"), ("t,air\n0,1\n1,2\n", "a file of --join has another")]
)
def test_a_joined_file_that_is_another_one_on_the_node_answers_nothing(
    tmp_path: Path, text: str | None, why: str
) -> None:
    pack.write_bundle(pack.pack(write_joined_spec(tmp_path), KEY), tmp_path / "bundle")
    joined = bundles.read(tmp_path / "bundle", None)
    (tmp_path / "mark").write_text(TOKEN)
    source, weather = write_csv(tmp_path / "rows.csv", WINDOWED, waves(100)), tmp_path / "weather.csv"
    loaded = Inference(joined.manifest, runtime.load_model(joined.manifest, joined.model_bytes))
    job = BatchPredictor(joined, loaded, joined={"weather": weather}).make_job(source, tmp_path / "out.csv")
    assert answer(joined, job, joined={"weather": weather}).error == ""
    job.target.unlink()
    weather.unlink()
    if text is not None:
        weather.write_text(text)
    result = answer(joined, job, joined={"weather": weather})
    assert (result.totals, result.is_usage_error) == (None, True)
    assert why in result.error
    assert not job.target.exists()


@pytest.mark.parametrize("mark", [None, "of another run"])
def test_another_folder_of_the_same_name_is_not_written_to(
    bundle: Bundle, job: FileJob, tmp_path: Path, mark: str | None
) -> None:
    (tmp_path / "mark").unlink()
    if mark is not None:
        (tmp_path / "mark").write_text(mark)
    result = answer(bundle, job)
    assert (result.totals, result.is_usage_error) == (None, True)
    assert f"{tmp_path} is another folder" in result.error
    assert not job.target.exists()


def test_another_file_of_the_same_name_is_not_predicted(bundle: Bundle, job: FileJob) -> None:
    write_csv(job.source, TABULAR, readings(51))
    result = answer(bundle, job)
    assert (result.totals, result.is_usage_error) == (None, True)
    assert "another size or time" in result.error


def test_a_file_that_kills_every_worker_is_given_up(folder: Path, job: FileJob) -> None:
    code = """
import os, sys
from pathlib import Path
from outstation.workbench.evaluation.predict import ray_worker
from outstation.workbench.evaluation.predict.ledger import FileJob
from tests.workbench.evaluation.test_ray_worker import answer, bundles
ray_worker.MAX_ATTEMPTS = 2
ray_worker.BatchPredictor.predict_file = lambda *_: os._exit(9)
bundle, source, target, identity, token = sys.argv[1:]
print(answer(bundles.read(Path(bundle), None), FileJob(Path(source), Path(target), identity), token=token).error)
"""
    command = [sys.executable, "-c", code, str(folder), *(str(item) for item in job), TOKEN]
    ends = [subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT) for _ in range(3)]
    assert [end.returncode for end in ends] == [9, 9, 0]
    assert f"{job.source}: 2 workers died over it" in ends[-1].stdout


def test_a_worker_waits_for_another_that_still_writes(
    bundle: Bundle, job: FileJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = output.open_locked(output.partial_path(job.target))
    monkeypatch.setattr("outstation.workbench.evaluation.predict.ray_worker.time.sleep", lambda _: held.close())
    result = answer(bundle, job)
    assert held.closed
    assert result.error == ""
    assert job.target.exists()


def test_a_disk_error_is_returned_and_is_no_usage_error(
    bundle: Bundle, job: FileJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(BatchPredictor, "predict_file", full)
    result = answer(bundle, job)
    assert (result.totals, result.is_usage_error) == (None, False)
    assert "No space left on device" in result.error


def run(*args: object) -> Result:
    return CliRunner().invoke(command, ["run", *(str(arg) for arg in args)])


def test_without_ray_the_error_says_what_to_install(
    folder: Path, job: FileJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as ended:
        main(["model", "run", str(folder), str(job.source), "-o", str(job.target), "--engine", "ray"])
    assert ended.value.code == 2
    assert "pip install 'outstation[ray]'" in capsys.readouterr().err


def test_an_address_without_the_engine_is_refused(folder: Path, job: FileJob) -> None:
    result = run(folder, job.source, "-o", job.target, "--address", "127.0.0.1:6379")
    assert isinstance(result.exception, UsageError)
    assert "--engine ray" in str(result.exception)
