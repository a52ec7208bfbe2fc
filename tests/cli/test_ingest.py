"""Command `outstation ingest`: files through the daemon or into the store; every bad line is named."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outstation.__main__ import main
from outstation.device import config
from outstation.device.cli.data.ingest import _DaemonSink
from outstation.device.recovery.open import open_store
from outstation.device.store.quota import PAGE_SIZE
from outstation.device.store.rows import RawColumns, validate_columns
from outstation.device.store.store import Store
from outstation.ml.datasets.tables import BLOCK_BYTES
from outstation.protocol.client import Client
from outstation.workbench.testing.patience import wait_until
from tests.kit.stations import ROOT, T0, Killable, Station, rows_of

CONFIG = """\
[device]
id = "pi-07"
fleet = "acme"
data_dir = "data"

[buffer]
commit_every = "20 ms"
max_size = "{max_size}"

[streams.watch]
fields = [{{ name = "ax", unit = "g", min = -16, max = 16 }}, {{ name = "ay", unit = "g", min = -16, max = 16 }}]

[streams.machine]
fields = [{{ name = "power", type = "f64", min = 0 }}, {{ name = "count", type = "i64" }},
          {{ name = "mode", type = "category" }}, {{ name = "heat", optional = true }}]

[streams.wide]
fields = [{wide}]
"""
N = 10_000
BAD = {2: "99,0", 17: "fast,0", 5_000: "1", 9_999: "", 10_001: "nan,0"}
REASONS = {
    2: "ax is above max 16",
    17: "ax is no number",
    5_000: "1 values, the header names 3",
    9_999: "t = 1 runs backwards",
    10_001: "ax is no finite number",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    columns = ", ".join(f'{{ name = "f{i}", type = "f64" }}' for i in range(200))
    (tmp_path / "outstation.toml").write_text(CONFIG.format(max_size="64 MiB", wide=columns))
    (tmp_path / "data").mkdir()
    return tmp_path


@contextmanager
def daemon(home: Path, **store: Any) -> Iterator[Station]:
    with Station(config.load(home / "outstation.toml"), **store) as station:
        yield station
        assert station.failures == []


@pytest.fixture(params=["with the daemon", "without a daemon"])
def agent(request: pytest.FixtureRequest, home: Path) -> Iterator[Station | None]:
    if request.param == "without a daemon":
        yield None
        return
    with daemon(home) as station:
        yield station


@pytest.fixture
def ingest(home: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`ingest("watch", file)` is the exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["ingest", *map(str, arguments), "-c", str(home / "outstation.toml")])
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run


def stored_rows(home: Path, stream: str, agent: Station | None = None) -> Any:
    """All rows of a stream, read beside the daemon."""
    definition = config.load(home / "outstation.toml").streams[stream]
    store = agent.store if agent else Store.open_read_only(home / "data")
    try:
        return rows_of(store, stream, definition)
    finally:
        if agent is None:
            store.close()


def csv_with_five_bad_lines(path: Path) -> Path:
    lines = ["t,ax,ay", *(f"{T0 + n / 100:.2f},{n % 16},-1.5" for n in range(2, N + 2))]
    for number, values in BAD.items():
        time_of = "1" if number == 9_999 else f"{T0 + number / 100:.2f}"
        lines[number - 1] = f"{time_of},{values or '1,1'}" if number != 5_000 else "1"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_of_ten_thousand_lines_the_five_bad_ones_are_named(
    home: Path, agent: Station | None, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    file = csv_with_five_bad_lines(home / "in.csv")
    code, out, err = ingest("watch", file, "--json")
    assert code == 1
    assert err == ""
    document = json.loads(out)
    assert document["accepted"] == 9_995
    assert [rejected["line"] for rejected in document["rejected"]] == list(REASONS)
    for rejected in document["rejected"]:
        assert REASONS[rejected["line"]].removeprefix("t = 1 ") in rejected["reason"]
    rows = stored_rows(home, "watch", agent)
    good = [n for n in range(2, N + 2) if n not in BAD]
    assert rows.t.tolist() == [round((T0 + n / 100) * 100) * 10_000 for n in good]
    assert rows.columns[0].tolist() == [n % 16 for n in good]
    assert set(rows.columns[1].tolist()) == {-1.5}


def test_for_a_person_there_is_a_sum_and_the_reason_for_each_bad_line(
    home: Path, agent: Station | None, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = ingest("watch", csv_with_five_bad_lines(home / "in.csv"))
    assert code == 1
    first, *others = [line for line in out.splitlines() if not line.startswith("What to do: ")]
    assert first == "9995 rows accepted, 5 rejected"
    assert others[0] == "  line 2: ax is above max 16"
    assert len(others) == 5


def test_the_same_advice_about_two_reasons_is_given_once(
    home: Path, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    (home / "in.csv").write_text("ax,ay\n17,0\n-17,0\n")
    _, out, _ = ingest("watch", home / "in.csv")
    assert out.splitlines()[0] == "0 rows accepted, 2 rejected"
    assert out.count("What to do: max and min are in the config") == 1


def test_of_very_many_bad_lines_twenty_are_shown(home: Path, ingest: Callable[..., tuple[int, str, str]]) -> None:
    (home / "in.csv").write_text("ax,ay\n" + "x,y\n" * 100)
    code, out, _ = ingest("watch", home / "in.csv")
    assert code == 1
    assert out.splitlines()[0] == "0 rows accepted, 100 rejected"
    assert out.splitlines()[-2] == "  … and 80 more; --json lists them all"
    assert out.splitlines()[-1].startswith("What to do: write numbers as 1.5")
    assert len(out.splitlines()) == 23


def test_every_type_of_field_comes_through_whole(
    home: Path, agent: Station | None, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    lines = [f"{0.1 * n!r},{2**53 + n},m{n % 3},{n if n % 2 else ''}" for n in range(3_000)]
    (home / "in.csv").write_text("power,count,mode,heat\n" + "\n".join(lines))
    assert ingest("machine", home / "in.csv")[0] == 0
    rows = stored_rows(home, "machine", agent)
    assert rows.columns[0].tolist() == [0.1 * n for n in range(3_000)]
    assert rows.columns[1].tolist() == [2**53 + n for n in range(3_000)]
    assert rows.columns[2].tolist() == [1 + n % 3 for n in range(3_000)]
    assert [v == v for v in rows.columns[3].tolist()] == [n % 2 == 1 for n in range(3_000)]


def test_json_lines_and_parquet_are_taken_too(
    home: Path, agent: Station | None, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (home / "in.jsonl").write_text(
        '{"ax":1,"ay":2,"t":"2025-11-24T22:18:00Z"}\n\n{"ax":3}\n{"stream":"watch","ax":4,"ay":5}\n'
    )
    parquet.write_table(pyarrow.table({"ax": [6.0, 99.0], "ay": [7.0, 8.0]}), home / "in.parquet")
    first = json.loads(ingest("watch", home / "in.jsonl", "--json")[1])
    assert first == {"accepted": 2, "rejected": [{"line": 3, "reason": "ay is missing"}], "handled_before": 0}
    second = json.loads(ingest("watch", home / "in.parquet", "--json")[1])
    assert second == {"accepted": 1, "rejected": [{"line": 2, "reason": "ax is above max 16"}], "handled_before": 0}
    assert stored_rows(home, "watch", agent).columns[0].tolist() == [1, 4, 6]


def test_a_stream_of_very_many_fields_goes_through_the_daemon_too(
    home: Path, agent: Station | None, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    names = ",".join(f"f{i}" for i in range(200))
    value = ",".join([repr(-123456.78901234567)] * 200)
    (home / "in.csv").write_text(names + "\n" + f"{value}\n" * 3_000)
    code, out, err = ingest("wide", home / "in.csv")
    assert (code, out, err) == (0, "3000 rows accepted, 0 rejected\n", "")


@pytest.mark.parametrize("locale", ["C.UTF-8", "C", "POSIX"])
def test_stdin_is_read_as_utf8_in_any_locale(home: Path, locale: str) -> None:
    environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "outstation", "ingest", "machine", "-c", str(home / "outstation.toml"), "--json"]
    lines = 'power,count,mode\r\n1,1,größe\r\n2,2,"two\nlines"\r\n3,3,'.encode() + b"\xff\r\n"
    done = subprocess.run(command, input=lines, capture_output=True, cwd=ROOT, env=environment)
    assert done.stderr == b""
    assert done.returncode == 1
    assert json.loads(done.stdout) == {
        "accepted": 2,
        "rejected": [{"line": 5, "reason": "mode is no category: text of 1-64 characters"}],
        "handled_before": 0,
    }
    store = Store.open_read_only(home / "data")
    assert store.categories("machine", "mode") == ["", "größe", "two\nlines"]
    store.close()


def test_json_lines_come_from_stdin_too(home: Path) -> None:
    command = [sys.executable, "-m", "outstation", "ingest", "watch", "-", "-c", str(home / "outstation.toml")]
    done = subprocess.run(command, input=b'{"ax":1,"ay":2}\n', capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"1 row accepted, 0 rejected\n", b"")


@pytest.mark.parametrize(
    ("stream", "file", "content", "message"),
    [
        ("wacth", "in.csv", "ax,ay\n1,2\n", "streams: there is no stream 'wacth'; did you mean 'watch'?"),
        ("watch", "none.csv", None, "none.csv: No such file or directory"),
        ("watch", ".", None, ": Is a directory"),
        ("watch", "in.csv", "", "in.csv: the file is empty; its first line must name the columns"),
        ("watch", "in.csv", "ax,az\n1,2\n", "in.csv: column 'az' is not a field of this stream; did you mean 'ay'?"),
        ("watch", "in.csv", "ax\n1\n", "in.csv: column 'ay' is missing; the first line must name the columns"),
        ("watch", "in.xlsx", "", "in.xlsx: .xlsx is not read; use one of .csv, .jsonl, .ndjson, .parquet"),
        ("watch", "in.parquet", "PAR1", "in.parquet: not readable as Parquet"),
    ],
)
def test_what_cannot_be_taken_at_all_is_one_line_on_stderr_and_exit_code_2(
    home: Path,
    agent: Station | None,
    ingest: Callable[..., tuple[int, str, str]],
    stream: str,
    file: str,
    content: str | None,
    message: str,
) -> None:
    if content is not None:
        (home / file).write_text(content)
    code, out, err = ingest(stream, home / file, "--json")
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_columns_of_another_program_are_renamed_left_out_and_separated_by_semicolons(
    home: Path, agent: Station | None, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    text = '\ufeffZeit;Beschleunigung x;"y;2";Notiz\n'
    text += '2025-11-25 01:00:00;1,5;-2,25;"a;b"\n2025-11-25 01:00:01;2;3;\n2025-11-25 01:00:02;1,5,5;3;\n'
    (home / "in.csv").write_text(text, encoding="utf-8")
    options = ["--map", "Zeit=t", "--map", "Beschleunigung x=ax", "--map", "y;2=ay", "--ignore", "Notiz"]
    code, out, err = ingest("watch", home / "in.csv", *options, "--timezone", "Europe/Berlin", "--json")
    assert (code, err) == (1, "")
    document = json.loads(out)
    assert document["accepted"] == 2
    assert [(bad["line"], bad["reason"]) for bad in document["rejected"]] == [(4, "ax is no number")]
    rows = stored_rows(home, "watch", agent)
    assert [column.tolist() for column in rows.columns] == [[1.5, 2], [-2.25, 3]]
    midnight = 1_764_028_800_000_000
    assert rows.t.tolist() == [midnight, midnight + 1_000_000]


def test_json_lines_are_renamed_too_and_a_tab_separates(
    home: Path, agent: Station | None, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    (home / "in.jsonl").write_text('{"x": 1, "ay": 2, "note": "n"}\n{"ax": 1, "ay": 2}\n')
    code, out, _ = ingest("watch", home / "in.jsonl", "--map", "x=ax", "--ignore", "note", "--json")
    assert code == 1
    assert [bad["line"] for bad in json.loads(out)["rejected"]] == [2]
    (home / "in.csv").write_text("ax|ay\n3|4\n")
    assert ingest("watch", home / "in.csv", "--sep", "|")[0] == 0
    (home / "tab.csv").write_text("ax\tay\n5\t6\n")
    assert ingest("watch", home / "tab.csv")[0] == 0
    assert stored_rows(home, "watch", agent).columns[0].tolist() == [1, 3, 5]


def test_a_local_time_is_refused_with_the_way_to_name_its_zone(
    home: Path, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    (home / "in.csv").write_text("t,ax,ay\n2026-11-27 10:00:00,1,2\n")
    code, out, _ = ingest("watch", home / "in.csv")
    assert code == 1
    assert "has no time zone; add Z or +01:00" in out
    assert "--timezone Europe/Berlin" in out


def test_of_an_hour_that_comes_twice_the_order_of_the_rows_tells_which_it_is(
    home: Path, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    times = ["02:30:00", "02:59:59", "02:00:00", "02:30:00", "03:00:00"]
    (home / "in.csv").write_text("t,ax,ay\n" + "".join(f"2025-10-26 {t},1,{i}\n" for i, t in enumerate(times)))
    assert ingest("watch", home / "in.csv", "--timezone", "Europe/Berlin")[0] == 0
    start = 1_761_438_600_000_000
    spans = [0, 1799, 1800, 3600, 5400]
    assert stored_rows(home, "watch").t.tolist() == [start + span * 1_000_000 for span in spans]
    (home / "gap.csv").write_text("t,ax,ay\n2026-03-29 02:30:00,1,2\n")
    assert ingest("watch", home / "gap.csv", "--timezone", "Europe/Berlin")[0] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--map", "ax"], "--map 'ax': write COLUMN=FIELD"),
        (["--map", "x=az"], "--map 'x=az': the stream has no field 'az'; did you mean 'ay'?"),
        (["--map", "x=ax", "--map", "y=ax"], "named twice"),
        (["--map", "x=ax"], "--map: the file has no column 'x'"),
        (["--sep", ";;"], "--sep ';;': give one character"),
        (["--timezone", "Europe/Berlinn"], "'Europe/Berlinn': no time zone of this machine"),
        ([], "column 'az' is not a field of this stream; did you mean 'ay'?; --map COLUMN=FIELD renames a column"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(
    home: Path, ingest: Callable[..., tuple[int, str, str]], options: list[str], message: str
) -> None:
    (home / "in.csv").write_text("ax,ay,az\n1,2,3\n")
    code, _, err = ingest("watch", home / "in.csv", *options)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_file_with_its_header_only_is_no_error(
    home: Path, agent: Station | None, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    (home / "in.csv").write_text("ax,ay\n")
    assert ingest("watch", home / "in.csv") == (0, "0 rows accepted, 0 rejected\n", "")


def test_ingest_during_a_daemon_run_is_one_more_producer(
    home: Path, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    (home / "in.csv").write_text("t,ax,ay\n" + "".join(f"{T0 + n},1,1\n" for n in range(5_000)))
    with daemon(home) as station, Client(station.socket) as client:
        ended = threading.Event()

        def produce() -> None:
            while not ended.is_set():
                client.send("watch", ax=2, ay=2)
                time.sleep(0.001)

        producer = threading.Thread(target=produce)
        producer.start()
        assert ingest("watch", home / "in.csv")[0] == 0
        ended.set()
        producer.join()
        client.flush()
        ax = station.rows("watch").columns[0].tolist()
        assert ax.count(1) == 5_000
        assert ax.count(2) == client.through


def test_rows_that_a_full_store_refuses_are_named_line_by_line(
    home: Path, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    lines, accepted = 100_000, 0
    (home / "in.csv").write_text("ax,ay\n" + "1,1\n" * lines)
    text = (home / "outstation.toml").read_text().replace("64 MiB", "1 MiB")
    (home / "outstation.toml").write_text(text)
    for turn in ("without", "with"):
        if turn == "with":
            with daemon(home, max_size=256 * PAGE_SIZE):
                code, out, _ = ingest("watch", home / "in.csv", "--json")
        else:
            code, out, _ = ingest("watch", home / "in.csv", "--json")
        document = json.loads(out)
        assert code == 1
        assert document["accepted"] + len(document["rejected"]) + document["handled_before"] == lines
        # The second run continues where the store became full.
        assert document["handled_before"] == accepted
        assert document["accepted"] > 0 or turn == "with"
        assert "not stored" in document["rejected"][-1]["reason"]
        named = {rejected["line"] for rejected in document["rejected"]}
        assert len(named) == len(document["rejected"])
        assert named <= set(range(2, lines + 2))
        accepted += document["accepted"]
    store = Store.open_read_only(home / "data")
    assert store.last_row("watch") == accepted
    store.close()


class _Line(int):
    """A line's number that knows how many of its kind there are."""

    there = 0

    def __init__(self, *_: object) -> None:
        _Line.there += 1

    def __del__(self) -> None:
        _Line.there -= 1


def test_of_a_long_file_only_unanswered_lines_are_in_memory(home: Path) -> None:
    stream, rows, blocks = config.load(home / "outstation.toml").streams["watch"], 4096, 150
    with daemon(home) as station:
        target = _DaemonSink(station.socket, "file:long", "watch", stream)
        for block in range(blocks):
            t = T0 + np.arange(block * rows, (block + 1) * rows) / 100
            raw = RawColumns(rows, t, {"ax": np.ones(rows), "ay": np.ones(rows)})
            lines: list[int] = [_Line(2 + block * rows + i) for i in range(rows)]
            target.put(validate_columns(raw, stream, round(T0 * 1e6), None), lines)
        del lines
        assert _Line.there < blocks * rows / 2
        assert target.finish() == (blocks * rows, {})
        assert _Line.there == 0
        target.close()


def test_a_daemon_killed_midway_is_named_with_the_last_stored_line(home: Path) -> None:
    killable = Killable(home / "data", commit_every_s=0.05)
    killable.start()
    command = [sys.executable, "-m", "outstation", "ingest", "watch", "-", "-c", str(home / "outstation.toml")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        # Long lines, since the command sends no row before it has read a block.
        lines = b"1." + b"0" * 400 + b",1\n"
        lines *= BLOCK_BYTES // len(lines) + 1
        process.stdin.write(b"ax,ay\n" + lines)
        process.stdin.flush()
        reader = Store.open_read_only(home / "data")
        wait_until("rows are stored", lambda: reader.last_row("watch") > 5_000)
        killable.kill()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(lines * 2)
            process.stdin.close()
        err = process.stderr.read().decode()
        assert process.wait(60) == 1
    assert err.startswith("outstation: the daemon went away (")
    line = int(err.rpartition("all rows before line ")[2].split()[0])
    assert 2 < line <= reader.last_row("watch") + 2
    reader.close()


@pytest.mark.attack("files")
def test_a_file_that_ends_its_confined_decoder_costs_no_row_before_it(home: Path) -> None:
    command = [sys.executable, "-m", "outstation", "ingest", "watch", "-", "-c", str(home / "outstation.toml")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(b"ax,ay\n" + b"1,1\n" * BLOCK_BYTES)
        process.stdin.flush()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
        status = {child: Path(f"/proc/{child}/status").read_text(encoding="ascii") for child in children}
        [decoder] = [child for child in children if "Seccomp:\t2\n" in status[child]]
        os.kill(int(decoder), signal.SIGKILL)
        err = process.stderr.read().decode()
        assert process.wait(60) == 2
    assert "the process that decodes it ended with SIGKILL" in err
    accepted = int(err.rpartition("; ")[2].split()[0])
    assert accepted == len(stored_rows(home, "watch")) > 0


def test_a_socket_that_a_crash_left_behind_does_not_matter(
    home: Path, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    with daemon(home) as station:
        station.socket.rename(home / "kept")
    (home / "kept").rename(home / "data" / "intake.sock")
    (home / "in.csv").write_text("ax,ay\n1,2\n")
    assert ingest("watch", home / "in.csv")[0] == 0


def test_a_data_folder_that_cannot_be_written_is_one_line(
    home: Path, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    (home / "in.csv").write_text("ax,ay\n1,2\n")
    (home / "data").rmdir()
    (home / "data").write_text("no folder")
    code, _, err = ingest("watch", home / "in.csv")
    assert (code, err.count("\n")) == (1, 1)
    assert f"{home / 'data'}: " in err
    assert "check [device] data_dir" in err


def test_another_process_that_holds_the_store_without_listening_is_named(
    home: Path, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    (home / "in.csv").write_text("ax,ay\n1,2\n")
    store = open_store(home / "data")
    code, _, err = ingest("watch", home / "in.csv")
    store.close()
    assert code == 1
    assert f"another outstation (process {os.getpid()}) uses this data folder" in err
    assert "the daemon takes no rows now" in err
    assert err.count("\n") == 1


def test_rows_rejected_by_another_config_are_an_error_that_names_it(
    home: Path, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    (home / "in.csv").write_text("ax,ay\n1,1\n15,1\n")
    text = (home / "outstation.toml").read_text()
    (home / "outstation.toml").write_text(text.replace("max = 16", "max = 10"))
    with daemon(home):
        (home / "outstation.toml").write_text(text)
        code, _, err = ingest("watch", home / "in.csv")
    assert code == 1
    assert "if the config changed since the daemon was started, restart it. 1 rows were accepted" in err


def test_a_file_that_is_added_again_under_any_name_adds_nothing(
    home: Path, agent: Station | None, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    text = "t,ax,ay\n" + "".join(f"{T0 + n},1,1\n" for n in range(3_000))
    for name in ("in.csv", "in.csv", "copy.csv"):
        (home / name).write_text(text)
        code, out, err = ingest("watch", home / name, "--json")
        assert (code, err) == (0, "")
        document = json.loads(out)
        assert document["accepted"] + document["handled_before"] == 3_000
    assert document["handled_before"] == 3_000
    assert ingest("watch", home / "in.csv")[1].splitlines() == [
        "0 rows accepted, 0 rejected",
        "3000 rows of this file were handled by an earlier run",
    ]
    assert len(stored_rows(home, "watch", agent)) == 3_000


def test_a_file_that_is_read_in_another_way_the_second_time_loses_no_row(
    home: Path, agent: Station | None, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    rows = [{"t": T0 + n, "ax": 1, "ay": 1} | ({"rssi": 1} if n < 1_500 else {}) for n in range(3_000)]
    (home / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for options in ((), ("--ignore", "rssi")):
        document = json.loads(ingest("watch", home / "in.jsonl", *options, "--json")[1])
        assert (document["accepted"], document["handled_before"]) == (1_500, 0)
    assert len(stored_rows(home, "watch", agent)) == 3_000


def test_an_ignored_member_of_json_lines_is_left_out(home: Path, ingest: Callable[..., tuple[int, str, str]]) -> None:
    (home / "in.jsonl").write_text(f'{{"t":{T0},"power":1,"count":2,"mode":"on","heat":3}}\n')
    assert ingest("machine", home / "in.jsonl", "--ignore", "heat")[0] == 0
    assert np.isnan(stored_rows(home, "machine").columns[3]).all()


def test_equal_readings_without_a_time_are_added_at_every_run(
    home: Path, agent: Station | None, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    (home / "in.csv").write_text("ax,ay\n1,2\n")
    # The second row has no time.
    (home / "in.jsonl").write_text(f'{{"t":{T0},"ax":1,"ay":2}}\n{{"ax":1,"ay":2}}\n')
    for run in range(3):
        document = json.loads(ingest("watch", home / "in.csv", "--json")[1])
        assert (document["accepted"], document["handled_before"]) == (1, 0)
        document = json.loads(ingest("watch", home / "in.jsonl", "--json")[1])
        assert (document["accepted"], document["handled_before"]) == (1 if run else 2, 0)
    assert len(stored_rows(home, "watch", agent)) == 7


def test_a_file_with_duplicates_is_not_stored_twice_once_its_stream_accepts_them(
    home: Path, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    (home / "in.csv").write_text(f"t,ax,ay\n{T0},1,1\n{T0},1,1\n{T0 + 1},1,1\n")
    code, out, _ = ingest("watch", home / "in.csv")
    assert code == 1
    assert 'set duplicates = "accept" in [streams.watch] for later rows, and send none of these again' in out
    text = (home / "outstation.toml").read_text()
    (home / "outstation.toml").write_text(text.replace("[streams.watch]", '[streams.watch]\nduplicates = "accept"'))
    assert ingest("watch", home / "in.csv")[1].splitlines() == [
        "0 rows accepted, 0 rejected",
        "3 rows of this file were handled by an earlier run",
    ]
    assert len(stored_rows(home, "watch")) == 2


def test_files_of_a_stream_that_may_repeat_are_added_each_time(
    home: Path, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    text = (home / "outstation.toml").read_text()
    (home / "outstation.toml").write_text(text.replace("[streams.watch]", '[streams.watch]\nduplicates = "accept"'))
    (home / "in.csv").write_text(f"t,ax,ay\n{T0},1,1\n")
    for _ in range(2):
        assert ingest("watch", home / "in.csv")[:2] == (0, "1 row accepted, 0 rejected\n")


def test_a_run_that_was_killed_is_continued_and_doubles_no_row(
    home: Path, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    total = 200_000
    (home / "in.csv").write_text("ax,ay\n" + "1,2\n" * total)
    command = [sys.executable, "-m", "outstation", "ingest", "watch", str(home / "in.csv")]
    command += ["-c", str(home / "outstation.toml")]
    with daemon(home) as station:
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
            wait_until("rows are stored", lambda: station.store.last_row("watch") > 5_000)
            process.kill()
        before = station.store.last_row("watch")
        assert before < total
    code, out, _ = ingest("watch", home / "in.csv", "--json")
    document = json.loads(out)
    assert (code, document["accepted"] + document["handled_before"]) == (0, total)
    assert document["handled_before"] >= before
    assert len(stored_rows(home, "watch")) == total


def test_rows_that_another_file_has_are_named_line_by_line(
    home: Path, agent: Station | None, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    def write(name: str, rows: range) -> None:
        (home / name).write_text("t,ax,ay\n" + "".join(f"{T0 + n},{n % 7},1\n" for n in rows))

    write("first.csv", range(1_000))
    write("second.csv", range(990, 1_500))
    assert ingest("watch", home / "first.csv")[0] == 0
    code, out, _ = ingest("watch", home / "second.csv", "--json")
    document = json.loads(out)
    assert (code, document["accepted"]) == (1, 500)
    assert [item["line"] for item in document["rejected"][:5]] == [2, 3, 4, 5, 6]
    assert all(item["reason"].startswith("duplicate: ") for item in document["rejected"])
    assert len(stored_rows(home, "watch", agent)) == 1_500
