"""`--engine ray` on a real Ray cluster of two nodes: the output of one machine, whatever process or node is killed."""

from __future__ import annotations

import json
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from click.testing import CliRunner

from outstation.foundation.errors import UsageError
from outstation.workbench.authoring import pack
from outstation.workbench.cli.model.group import model as command
from outstation.workbench.evaluation.predict.ray_worker import MAX_ATTEMPTS
from outstation.workbench.testing.broker import free_port
from outstation.workbench.testing.patience import wait_until
from scripts.kit.bundles import (
    ANOMALY,
    CLASSIFY,
    KEY,
    LABELS,
    TABULAR,
    WINDOWED,
    packed,
    readings,
    waves,
    write_csv,
    write_joined_spec,
)
from tests.kit.clusters import WITHIN_S, Ray, cluster, ended
from tests.kit.stations import ROOT

pytest.importorskip("ray", reason="Ray is not installed here; scripts/test ray installs it apart and runs these")
pa = pytest.importorskip("pyarrow")
pytestmark = pytest.mark.timeout(3 * WITHIN_S)

LONG = 300_000  # rows that take a worker a second or two
FILES = 16  # of LONG rows: work for longer than a node takes to start


@pytest.fixture(scope="module")
def ray() -> Iterator[Ray]:
    """Yield a cluster of nodes 2 and 3; a test that kills one starts it again."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder, cluster(Path(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("bundle"), ANOMALY)


def write_parquet(path: Path, n: int, seed: int) -> None:
    from pyarrow import parquet

    rows = waves(n, seed)
    # A pause, which no window spans.
    t = np.arange(n) / 100 + np.where(np.arange(n) > n // 3, 7, 0)
    parquet.write_table(pa.table({"t": t, "u": rows[:, 0], "v": rows[:, 1]}), path, row_group_size=5000)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for i, n in enumerate((3000, 5001, 7, 12_345)):
        write_parquet(folder / f"{i}.parquet", n, i)
    return folder


@pytest.fixture
def long(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for i, n in enumerate((2000, LONG, LONG + 3)):
        write_parquet(folder / f"{i}.parquet", n, i)
    return folder


def here(bundle: Path, source: Path, out: Path) -> dict[str, object]:
    """Run on one machine, into `out`, and return the printed document."""
    result = CliRunner().invoke(command, ["run", str(bundle), str(source), "-o", str(out), "--json"])
    document: dict[str, object] = json.loads(result.stdout)
    return document


def require_same(first: Path, second: Path) -> None:
    """Require the same files with the same bytes, and no others."""
    names = [sorted(path.name for path in folder.iterdir()) for folder in (first, second)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_output_of_a_folder_and_its_rejected_rows_equal_one_machine(
    ray: Ray, bundle: Path, data: Path, tmp_path: Path
) -> None:
    lines = write_csv(data / "4.csv", ("u", "v"), waves(300)).read_text().splitlines()
    (data / "4.csv").write_text("\n".join([*lines[:100], "1,x,2", *lines[100:]]))
    code, document = ray.run(bundle, data, tmp_path / "there")
    wanted = here(bundle, data, tmp_path / "here")
    require_same(tmp_path / "there", tmp_path / "here")
    assert code == 1
    assert document["rejected_rows"] == [{"file": "4.csv", "line": 101, "reason": "u: 'x' is no number"}]
    assert document["rows"] == 3000 + 5001 + 7 + 12_345 + 300
    for totals in (document, wanted):
        del totals["out"], totals["seconds"]
    assert document == wanted


def test_another_worker_takes_over_the_file_of_a_killed_one(ray: Ray, bundle: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.parquet", tmp_path / "there.parquet"
    write_parquet(source, 8 * LONG, 1)
    driver = ray.begin_run(bundle, source, out)
    wait_until("a worker at the file", lambda: bool(ray.writers(tmp_path)), timeout_s=WITHIN_S)
    for writer in ray.writers(tmp_path).values():
        writer.kill()
    code, document = ended(driver)
    assert (code, document["rows"]) == (0, 8 * LONG)
    here(bundle, source, tmp_path / "here.parquet")
    assert out.read_bytes() == (tmp_path / "here.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.parquet", "in.parquet", "there.parquet"]


def test_nodes_killed_in_turn_lose_and_double_nothing(ray: Ray, bundle: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "there"
    source.mkdir()
    for i in range(FILES):
        write_parquet(source / f"{i}.parquet", LONG, i)
    driver = ray.begin_run(bundle, source, out)
    wait_until("both nodes at work", lambda: {2, 3} <= ray.writers(out).keys(), timeout_s=WITHIN_S)
    for number in (2, 3):
        # What the first killed one held goes to the other, and what that one holds to the first, which runs again.
        wait_until(f"node {number} at work", lambda number=number: number in ray.writers(out), timeout_s=WITHIN_S)  # type: ignore[misc]
        ray.kill_node(number)
        assert driver.poll() is None
        ray.start_node(number)
    code, document = ended(driver, 2 * WITHIN_S)
    assert (code, document["rows"], document["rejected"]) == (0, FILES * LONG, 0)
    here(bundle, source, tmp_path / "here")
    require_same(out, tmp_path / "here")


def test_files_of_a_further_input_are_joined_as_on_one_machine(ray: Ray, tmp_path: Path) -> None:
    pack.write_bundle(pack.pack(write_joined_spec(tmp_path), KEY), tmp_path / "bundle")
    joined = tmp_path / "bundle"
    data = tmp_path / "in"
    data.mkdir()
    for i in range(3):
        write_csv(data / f"{i}.csv", WINDOWED, waves(300, seed=i))
    options = ["--join", f"weather={tmp_path / 'weather.csv'}"]
    code, document = ray.run(joined, data, tmp_path / "there", *options)
    assert (code, document["rows"]) == (0, 900)
    CliRunner().invoke(command, ["run", str(joined), str(data), "-o", str(tmp_path / "here"), *options])
    require_same(tmp_path / "there", tmp_path / "here")


def test_a_second_driver_resumes_what_a_killed_one_left(ray: Ray, bundle: Path, long: Path, tmp_path: Path) -> None:
    out = tmp_path / "there"
    driver = ray.begin_run(bundle, long, out)
    ledger = out / ".outstation-run.part"
    wait_until("a file that is done", lambda: ledger.exists() and ledger.stat().st_size > 0, timeout_s=WITHIN_S)
    driver.kill()
    assert ended(driver)[0] == -signal.SIGKILL
    done = [path for path in out.iterdir() if path.suffix == ".parquet"]
    assert 1 <= len(done) < 3
    before = (out / "0.parquet").stat()
    code, document = ray.run(bundle, long, out)
    assert (code, document["rows"]) == (0, 2000 + 2 * LONG + 3)
    after = (out / "0.parquet").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    here(bundle, long, tmp_path / "here")
    require_same(out, tmp_path / "here")


def test_a_bundle_is_evaluated_with_the_figures_of_one_machine(ray: Ray, tmp_path: Path) -> None:
    tabular, data = packed(tmp_path, CLASSIFY), tmp_path / "in"
    data.mkdir()
    for i in range(3):
        rows = readings(200, seed=i)
        lines = write_csv(data / f"{i}.csv", TABULAR, rows).read_text().splitlines()
        labels = ["label", *(LABELS[k // 7 % 3] for k in range(len(rows)))]
        (data / f"{i}.csv").write_text("\n".join(f"{a},{b}" for a, b in zip(lines, labels, strict=True)))
    options = [str(tabular), str(data), "--no-latency", "--json"]
    code, there = ray.command("evaluate", *options, "--engine", "ray")
    one_machine = json.loads(CliRunner().invoke(command, ["evaluate", *options]).stdout)
    for totals in (there, one_machine):
        del totals["evaluated_at"], totals["seconds"]
    assert (code, there) == (0, one_machine)


def test_an_evaluation_stops_after_four_dead_workers(ray: Ray, tmp_path: Path) -> None:
    tabular, data = packed(tmp_path, CLASSIFY), tmp_path / "in.csv"
    lines = write_csv(data, TABULAR, readings(200)).read_text().splitlines()
    data.write_text("\n".join(f"{line},{'label' if i == 0 else LABELS[i % 3]}" for i, line in enumerate(lines)))
    driver, killed = ray.begin("evaluate", tabular, data, "--no-latency", "--json", "--engine", "ray"), set[int]()
    end = time.monotonic() + 3 * WITHIN_S
    while driver.poll() is None and time.monotonic() < end:
        # One that has a child proves the bundle: it has begun with the rows it was given.
        for worker in ray.workers():
            with suppress(psutil.NoSuchProcess):
                if worker.children():
                    worker.kill()
                    killed.add(worker.pid)
        time.sleep(0.02)
    code, message = ended(driver)
    assert (code, len(killed)) == (1, MAX_ATTEMPTS)
    assert "4 workers died over the windows of one file" in message


def test_an_unreadable_file_is_reported_with_its_node_and_exit_code_2(
    ray: Ray, bundle: Path, data: Path, tmp_path: Path
) -> None:
    (data / "2.parquet").write_bytes(b"PAR1 and no more")
    code, message = ray.run(bundle, data, tmp_path / "there")
    assert code == 2
    assert message.strip().splitlines()[-1].startswith("outstation: node ")
    assert f"{data / '2.parquet'}: not readable as Parquet" in message


def test_nodes_with_other_data_or_another_version_are_named_and_write_nothing(
    ray: Ray, bundle: Path, data: Path, tmp_path: Path
) -> None:
    version = tmp_path / "init.py"
    version.write_text(
        (ROOT / "agent/outstation/__init__.py").read_text().replace('__version__ = "', '__version__ = "9.')
    )
    stale = f"mount --bind {version} {ROOT}/agent/outstation/__init__.py"
    for mount, why in ((f"mount -t tmpfs none {data}", "does not exist"), (stale, "install the same on all")):
        for number in (2, 3):
            ray.kill_node(number)
            ray.start_node(number, ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"])
        code, message = ray.run(bundle, data, tmp_path / "there")
        assert code == 2
        assert message.strip().splitlines()[-1].startswith("outstation: node ")
        assert why in message
        assert not [path for path in (tmp_path / "there").iterdir() if not path.name.startswith(".")]
    for number in (2, 3):
        ray.kill_node(number)
        ray.start_node(number)


@pytest.mark.parametrize("lost", ["nodes", "head"])
def test_a_lost_cluster_is_reported_and_the_next_one_resumes(
    bundle: Path, long: Path, tmp_path: Path, lost: str
) -> None:
    out = tmp_path / "there"
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder, cluster(Path(folder)) as ray:
        driver = ray.begin_run(bundle, long, out)
        wait_until(
            "a file that is done", lambda: any(out.glob("*.parquet")) and bool(ray.writers(out)), timeout_s=WITHIN_S
        )
        for end in [ray.kill_head] if lost == "head" else [partial(ray.kill_node, node) for node in (2, 3)]:
            end()
        code, message = ended(driver)
    assert code == 1
    problem = "head .* has not answered" if lost == "head" else "no node of the cluster .*lost: 127.0.0.2, 127.0.0.3"
    assert re.search(f"outstation: .*{problem}.*finished files stay finished", message)
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder, cluster(Path(folder)) as ray:
        code, document = ray.run(bundle, long, out)
    assert (code, document["rows"]) == (0, 2000 + 2 * LONG + 3)
    here(bundle, long, tmp_path / "here")
    require_same(out, tmp_path / "here")


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "127.0.0.1", "127.0.0.1:99999", "head", "nobody"])
def test_an_unreachable_cluster_is_reported_within_seconds(
    bundle: Path, data: Path, tmp_path: Path, address: str
) -> None:
    if address == "nobody":
        address = f"127.0.0.1:{free_port()}"
    totals = ["run", str(bundle), str(data), "-o", str(tmp_path / "out"), "--engine", "ray", "--address", address]
    result = CliRunner().invoke(command, totals)
    assert isinstance(result.exception, UsageError)
    assert f"--address {address}" in str(result.exception)
    assert not (tmp_path / "out").exists()
