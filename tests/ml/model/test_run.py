"""`outstation model run`: files of any size, resumable, every row accounted for."""

from __future__ import annotations

import csv
import fcntl
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from outstation.__main__ import main
from outstation.foundation.arrays import Float32s, Ints
from outstation.foundation.errors import BadBundle, UsageError
from outstation.ml.datasets.readers import TableReader
from outstation.ml.datasets.tables import BLOCK_BYTES
from outstation.ml.model.bundle import bundle as bundles
from outstation.ml.model.inference import runtime
from outstation.ml.model.inference.inference import Inference
from outstation.workbench.cli.model.group import model as command
from outstation.workbench.evaluation.predict import output
from outstation.workbench.evaluation.predict import run as running
from outstation.workbench.evaluation.predict.ledger import LEDGER_NAME, FileJob, RunLedger, RunTotals
from outstation.workbench.evaluation.predict.run import BatchPredictor
from outstation.workbench.testing.messages import new_key
from scripts.kit.bundles import ANOMALY, CLASSIFY, KEY, LABELS, TABULAR, packed, readings, waves, write_csv

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tabular(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("tabular"), CLASSIFY)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("windowed"), ANOMALY)


def run(*args: object) -> Result:
    return CliRunner().invoke(command, ["run", *(str(arg) for arg in args)])


def work(bundle: Path, block: int = BLOCK_BYTES, *, raw: bool = True) -> BatchPredictor:
    loaded = bundles.read(bundle, None)
    model = runtime.load_model(loaded.manifest, loaded.model_bytes)
    return BatchPredictor(loaded, Inference(loaded.manifest, model), raw=raw, block_bytes=block)


def over(bundle: Path, source: Path, out: Path, block: int = BLOCK_BYTES) -> RunTotals:
    return work(bundle, block).predict_file(source, out, lambda *_: None)


def table(path: Path) -> dict[str, list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


def plain(bundle: Path, rows: Float32s) -> tuple[Float32s, Ints]:
    """Return (outputs, last rows from 1) of a plain loop over single windows."""
    loaded = bundles.read(bundle, None)
    model, spec = runtime.load_model(loaded.manifest, loaded.model_bytes), loaded.manifest.input
    size, step = (spec.window.rows, spec.window.step) if spec.window else (1, 1)
    starts = range(0, len(rows) - size + 1, step)
    windows = [rows[start : start + size].reshape(1, size, -1) for start in starts]
    return np.concatenate([model.invoke(item) for item in windows]), np.array([start + size for start in starts])


def test_every_row_gets_the_outputs_of_a_plain_loop_to_the_last_bit(tabular: Path, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "rows.csv", TABULAR, readings(2000))
    result = run(tabular, source, "-o", tmp_path / "out.csv", "--raw", "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["rows"], document["results"], document["rejected"]) == (0, 2000, 2000, 0)
    rows = np.array(
        [[float(row[name]) for name in TABULAR] for row in csv.DictReader(io.StringIO(source.read_text()))], np.float32
    )
    outputs, numbers = plain(tabular, rows)
    columns = table(tmp_path / "out.csv")
    assert list(columns) == ["row", "label", "score", "raw_0", "raw_1", "raw_2"]
    assert [int(row) for row in columns["row"]] == numbers.tolist()
    raw = np.array([columns[f"raw_{i}"] for i in range(3)], np.float32).T
    assert raw.tobytes() == outputs.tobytes()
    assert [LABELS[i] for i in outputs.argmax(axis=1)] == columns["label"]


@pytest.mark.parametrize("block", [200, 777, 4096])
def test_windows_that_span_blocks_get_the_answers_they_get_in_one_piece(
    windowed: Path, tmp_path: Path, block: int
) -> None:
    source = write_csv(tmp_path / "rows.csv", ("u", "v"), waves(700))
    over(windowed, source, tmp_path / "whole.csv")
    over(windowed, source, tmp_path / "pieces.csv", block)
    whole, pieces = table(tmp_path / "whole.csv"), table(tmp_path / "pieces.csv")
    assert whole["row"] == pieces["row"] == [str(8 + 4 * i) for i in range(174)]
    assert np.allclose(np.array(whole["value"], float), np.array(pieces["value"], float), rtol=1e-6)


def test_no_window_spans_a_pause(windowed: Path, tmp_path: Path) -> None:
    rows = waves(24)
    lines = ["t,u,v", *(f"{i * 0.01 + (5 if i >= 12 else 0)},{u},{v}" for i, (u, v) in enumerate(rows))]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    run(windowed, tmp_path / "rows.csv", "-o", tmp_path / "out.csv")
    assert table(tmp_path / "out.csv")["row"] == ["8", "12", "20", "24"]


def test_parquet_gives_parquet_with_the_figures_of_csv(tabular: Path, tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = readings(1500)
    values = {name: rows[:, i].astype(np.float64) for i, name in enumerate(TABULAR)}
    parquet.write_table(pa.table(values), tmp_path / "rows.parquet", row_group_size=400)
    lines = [",".join(TABULAR), *(",".join(str(float(v)) for v in row) for row in rows)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    assert run(tabular, tmp_path / "rows.parquet", "-o", tmp_path / "a.parquet", "--raw").exit_code == 0
    assert run(tabular, tmp_path / "rows.csv", "-o", tmp_path / "b.csv", "--raw").exit_code == 0
    made = parquet.read_table(tmp_path / "a.parquet").to_pydict()
    columns = table(tmp_path / "b.csv")
    assert list(made) == list(columns)
    assert made["row"] == list(range(1, 1501))
    assert made["label"] == columns["label"]
    assert made["score"] == [float(score) for score in columns["score"]]


def test_rows_that_cannot_be_read_are_named_and_left_out(tabular: Path, tmp_path: Path) -> None:
    lines = ["a,b,c,d", "1,2,3,4", "1,2,3", "", "1,x,3,4", '"1",2,3,4', "1,,3,4", "1,1_0,3,4"]
    (tmp_path / "rows.csv").write_text("\r\n".join(lines))
    result = run(tabular, tmp_path / "rows.csv", "-o", tmp_path / "out.csv", "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["rows"], document["rejected"]) == (1, 3, 3)
    assert [(item["line"], item["reason"]) for item in document["rejected_rows"]] == [
        (3, "3 values, the header names 4"),
        (5, "b: 'x' is no number"),
        (8, "b: '1_0' is no number"),
    ]
    assert table(tmp_path / "out.csv")["row"] == ["1", "4", "5"]


def test_results_of_partly_missing_input_are_counted(tabular: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b,c,d\n1,2,3,4\n1,,3,4\n,,,\n")
    document = json.loads(run(tabular, tmp_path / "rows.csv", "-o", tmp_path / "out.csv", "--json").stdout)
    assert (document["results"], document["partly_missing"], document["rejected"]) == (3, 2, 0)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_killed_run_resumes_and_ends_with_the_same_bytes(windowed: Path, tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    source = write_csv(tmp_path / "rows.csv", ("u", "v"), waves(3000))
    over(windowed, source, tmp_path / f"whole{suffix}", 4096)
    out = tmp_path / f"killed{suffix}"
    assert killed_after(5, windowed, source, out) == -signal.SIGKILL
    assert not out.exists()
    turns: list[int] = []
    total = work(windowed, 4096).predict_file(source, out, lambda done, size, rows: turns.append(rows))
    assert out.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert total.rows == 3000
    assert turns[0] > 4 * 4096 / 30  # it went on; it did not begin again
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("killed")] == [out.name]


def killed_after(turns: int, bundle: Path, source: Path, out: Path) -> int:
    """Return the exit code of a run that writes a checkpoint after each block and is killed."""
    code = f"""
import os, signal, sys
from pathlib import Path
from outstation.workbench.evaluation.predict import run as running
from tests.ml.model.test_run import work
running.CHECKPOINT_INTERVAL_S = 0.0
done = []
def until(*_):
    done.append(1)
    if len(done) == {turns}:
        os.kill(os.getpid(), signal.SIGKILL)
work(Path({str(bundle)!r}), 4096).predict_file(Path({str(source)!r}), Path({str(out)!r}), until)
"""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True).returncode


def test_a_run_with_other_data_does_not_resume(windowed: Path, tmp_path: Path) -> None:
    source, out = write_csv(tmp_path / "rows.csv", ("u", "v"), waves(3000)), tmp_path / "out.csv"
    killed_after(5, windowed, source, out)
    write_csv(source, ("u", "v"), waves(2000, seed=3))
    over(windowed, source, out, 4096)
    over(windowed, source, tmp_path / "fresh.csv", 4096)
    assert out.read_bytes() == (tmp_path / "fresh.csv").read_bytes()


def test_a_folder_gives_a_folder_and_each_file_is_a_stream_of_its_own(windowed: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(3):
        write_csv(source / f"{i}.csv", ("u", "v"), waves(20, seed=i))
    (source / "notes.txt").write_text("not data")
    result = run(windowed, source, "-o", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["results"] == 3 * 4
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.csv", "1.csv", "2.csv"]
    assert table(tmp_path / "out" / "2.csv")["row"] == ["8", "12", "16", "20"]


def test_finished_files_of_a_folder_are_skipped_after_a_kill(
    tabular: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(3):
        write_csv(source / f"{i}.csv", TABULAR, readings(30, seed=i))
    done: list[str] = []
    file = BatchPredictor.predict_file

    def two(self: BatchPredictor, path: Path, *more: object) -> RunTotals:
        done.append(path.name)
        if len(done) == 3:
            raise KeyboardInterrupt
        return file(self, path, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(BatchPredictor, "predict_file", two)
    with pytest.raises(KeyboardInterrupt):
        running.predict_folder(work(tabular), source, tmp_path / "out", lambda *_: None)
    total = running.predict_folder(work(tabular), source, tmp_path / "out", lambda *_: None)
    assert done == ["0.csv", "1.csv", "2.csv", "2.csv"]
    assert (total.rows, total.results) == (90, 90)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.csv", "1.csv", "2.csv"]


def test_memory_does_not_grow_with_the_file(tabular: Path, tmp_path: Path) -> None:
    # Both fill whole blocks.
    small, large = (write_rows(tmp_path / f"{n}.csv", n) for n in (200_000, 1_000_000))
    assert large.stat().st_size > 10 * BLOCK_BYTES > 10 * 2**20
    assert peak_mib(tabular, large) < peak_mib(tabular, small) + 30


def write_rows(path: Path, n: int) -> Path:
    lines = "".join(",".join(f"{v:.7f}" for v in row) + "\n" for row in readings(1000))
    with path.open("w") as file:
        file.write("a,b,c,d\n")
        for _ in range(n // 1000):
            file.write(lines)
    return path


def peak_mib(bundle: Path, source: Path) -> float:
    """Return the peak resident memory of a run in a process of its own."""
    code = f"""
import re
from pathlib import Path
from tests.ml.model.test_run import work
source = Path({str(source)!r})
work(Path({str(bundle)!r}), raw=False).predict_file(source, source.with_suffix(".out.csv"), lambda *_: None)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return int(done.stdout) / 1024


@pytest.mark.parametrize(
    ("data", "out", "message"),
    [
        ("a,b,c\n1,2,3\n", "out.csv", "no column d; there is a, b, c"),
        ("a,b,c,d,a\n1,2,3,4,5\n", "out.csv", "column a is there twice"),
        ("", "out.csv", "its first line must name the columns"),
        ("a,b,c,d\n1,2,3,4\n", "out.txt", "name a file that ends in .csv or .parquet"),
        ("a,b,c,d\n1,2,3,4\n", "rows.csv", "is the data itself"),
    ],
)
def test_bad_data_and_bad_output_names_are_one_error(
    tabular: Path, tmp_path: Path, data: str, out: str, message: str
) -> None:
    (tmp_path / "rows.csv").write_text(data)
    result = run(tabular, tmp_path / "rows.csv", "-o", tmp_path / out)
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


def test_data_that_are_not_there_exit_with_2(tabular: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["model", "run", str(tabular), str(tmp_path / "none.csv"), "-o", str(tmp_path / "out.csv")])
    assert ended.value.code == 2


def test_without_pyarrow_csv_is_run_alike_and_parquet_says_what_to_install(
    tabular: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_csv(tmp_path / "rows.csv", TABULAR, readings(500))
    over(tabular, source, tmp_path / "with.csv", 4096)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    over(tabular, source, tmp_path / "without.csv", 4096)
    first, second = table(tmp_path / "with.csv"), table(tmp_path / "without.csv")
    assert first["label"] == second["label"]
    assert [float(x) for x in first["score"]] == [float(x) for x in second["score"]]
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    for data, out in (("rows.parquet", "a.csv"), ("rows.csv", "a.parquet")):
        with pytest.raises(UsageError, match=r"pip install 'outstation\[parquet\]'"):
            over(tabular, tmp_path / data, tmp_path / out)


def test_the_signature_is_printed_and_required_with_a_key(tabular: Path, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "rows.csv", TABULAR, readings(5))
    columns = json.loads(run(tabular, source, "-o", tmp_path / "a.csv", "--json").stdout)
    assert "not verified" in columns["signature"]
    columns = json.loads(
        run(tabular, source, "-o", tmp_path / "a.csv", "--publisher", KEY.public.text, "--json").stdout
    )
    assert columns["signature"] == f"by {KEY.public.kid}"
    refused = run(tabular, source, "-o", tmp_path / "b.csv", "--publisher", new_key(12).public.text)
    assert isinstance(refused.exception, BadBundle)
    assert not (tmp_path / "b.csv").exists()


def test_two_runs_do_not_write_one_file_together(tabular: Path, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "rows.csv", TABULAR, readings(50))
    item, other = work(tabular, 512), work(tabular, 512)

    def meanwhile(*_: int) -> None:
        with pytest.raises(UsageError, match="another `model run` writes it"):
            other.predict_file(source, tmp_path / "out.csv", lambda *_: None)

    assert item.predict_file(source, tmp_path / "out.csv", meanwhile).rows == 50


def test_a_file_finished_between_opening_and_lock_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, lock = tmp_path / "out.csv.part", fcntl.flock
    part.write_bytes(b"row\n1\n")

    def late(file: BinaryIO, operation: int) -> None:
        if part.exists() and part.stat().st_size:
            part.replace(tmp_path / "out.csv")
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with output.open_locked(part) as file:
        file.write(b"anew")
    assert (tmp_path / "out.csv").read_bytes() == b"row\n1\n"
    assert part.read_bytes() == b"anew"


def test_a_line_of_the_ledger_that_a_kill_tore_costs_only_that_file(tmp_path: Path) -> None:
    jobs = [FileJob(tmp_path / "in", tmp_path, str(i)) for i in range(3)]
    RunLedger(tmp_path).add(jobs[0], RunTotals(rows=5))
    with (tmp_path / LEDGER_NAME).open("ab") as file:
        file.write(b'{"identity":"1","tot')
    assert RunLedger(tmp_path).get(jobs[1]) is None
    RunLedger(tmp_path).add(jobs[2], RunTotals(rows=7))
    loaded = [RunLedger(tmp_path).get(job) for job in jobs]
    assert [None if item is None else item.rows for item in loaded] == [5, None, 7]


cells = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(["", " 1", "nan", "x", "1e3", '"2"', '"a\nb"', '"', "+3", "1_0", "inf", "٣"]),
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.lists(cells, min_size=1, max_size=3), max_size=30), block=st.integers(64, 400))
def test_blocks_of_any_size_give_the_rows_and_rejects_of_the_whole(
    rows: list[list[str]], block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    path.write_text("a,b\n" + "".join(",".join(row) + "\n" for row in rows), encoding="utf-8", newline="")
    whole, pieces = (read_all(path, size) for size in (1 << 20, block))
    assert whole == pieces


def read_all(path: Path, block: int) -> tuple[bytes, list[int], list[tuple[int, str]], list[str]]:
    """Return (values, row numbers, rejected rows, texts) of a file, read in blocks."""
    values, numbers, rejects, texts = b"", [], [], []
    for item in TableReader(path, ["a"], ["b"], block).blocks():
        values += item.rows.tobytes()
        numbers += item.row_numbers.tolist()
        rejects += [(r.line, r.reason) for r in item.rejected]
        texts += item.text_columns["b"].tolist()
    return values, numbers, rejects, texts


def test_reading_goes_on_from_any_place(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", ("a", "b"), waves(500))
    file = TableReader(path, ["a", "b"], block_bytes=1000)
    whole = list(file.blocks())
    assert len(whole) > 5
    for item, following in itertools.pairwise(whole):
        assert next(iter(file.blocks(item.next_position))).rows.tobytes() == following.rows.tobytes()


def test_times_that_are_missing_are_those_of_the_row_before(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("t,a\n,1\n5,2\n,3\n7.5,4\n")
    blocks = list(TableReader(tmp_path / "rows.csv", ["a"], block_bytes=64).blocks())
    assert np.concatenate([item.t for item in blocks]).tolist() == [0, 5_000_000, 5_000_000, 7_500_000]


def test_a_progress_bar_needs_a_terminal_and_a_second() -> None:
    from outstation.foundation.cli.progress import ProgressBar

    held, stderr = io.StringIO(), sys.stderr
    held.isatty = lambda: True  # type: ignore[method-assign]
    try:
        sys.stderr = held
        with ProgressBar("rows") as bar:
            bar(1, 2, 100)
            assert held.getvalue() == ""
            bar._next_s = bar._started_s = bar._started_s - 2
            bar(1, 2, 100)
            assert "50%  100 rows" in held.getvalue()
    finally:
        sys.stderr = stderr
    assert os.linesep not in held.getvalue()


@pytest.mark.parametrize(("has_lines", "lines"), [(True, [" 50%  100 rows, 10/s, 10 s left"]), (False, [])])
def test_progress_without_a_terminal_is_a_line_each_ten_seconds(
    has_lines: bool, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from outstation.foundation.cli import progress

    moments = iter((0.0, 9.0, 10.0, 19.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(moments))
    with progress.ProgressBar("rows", has_lines=has_lines) as bar:
        for _ in range(3):
            bar(1, 2, 100)
    assert capsys.readouterr().err.splitlines() == lines
