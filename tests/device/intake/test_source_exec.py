"""Source exec: rows of a child process that may hang, flood, die or print nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from outstation.device.config.sources import ExecSource
from outstation.device.config.stream_privacy import StreamPrivacy
from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake.group_commit import CommitOutcome
from outstation.device.intake.source import SourceContext
from outstation.device.intake.sources import exec as exec_source
from outstation.device.intake.sources import program
from outstation.device.intake.sources.exec import ProgramReader
from outstation.device.recovery.open import open_store
from outstation.device.store.rows import RawColumns
from outstation.device.store.store import Store
from outstation.foundation.backoff import Backoff
from outstation.foundation.config.quantities import Duration
from outstation.foundation.errors import ConfigError
from outstation.workbench.testing.patience import wait_until
from tests.kit.stations import T0, Station, conf

FIELDS = [
    FieldConfig(name="n", type="f64"),
    FieldConfig(name="room", type="category", optional=True),
]

OPEN = StreamPrivacy()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program is started again after a twentieth of a second."""
    monkeypatch.setattr(exec_source, "_RESTART", Backoff(0.05, 0.2))


@contextmanager
def running(
    folder: Path, script: str, privacy: StreamPrivacy = OPEN, shell: str = sys.executable, **source: Any
) -> Iterator[Station]:
    """A device that runs a script, of Python by default."""
    (folder / "sensor.py").write_text(script)
    made = ExecSource(command=[shell, "sensor.py"], **source)
    stream = StreamConfig(fields=FIELDS, source=made, duplicates="accept", privacy=privacy)
    with Station(
        conf(folder / "data", sensor=stream),
        sources=lambda store: [ProgramReader("sensor", stream, made, store, folder)],
    ) as station:
        yield station
        assert station.failures == []


def numbers(station: Station) -> list[float]:
    result: list[float] = station.rows("sensor").columns[0].tolist() if station.store.last_row("sensor") else []
    return result


def counted(station: Station, counter: str) -> Callable[[], int]:
    return lambda: station.store.counters().get(f"{counter}.sensor", 0)


def has_ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def test_json_lines_become_rows_and_wrong_ones_are_refused_with_a_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [
        f'{{"n": 1, "t": {T0}, "room": "attic"}}',
        f'{{"n": "x", "t": {T0}}}',
        f'{{"n": [1], "t": {T0}}}',
        '{"n": 1e999}',
        '{"n": 1, "n": 2}',
        '{"m": 1}',
        "[1]",
        "\\x1b[31m no JSON",
        '{"n": 1, "t": "yesterday"}',
        '{"n": 1, "t": {}}',
        "",
        f'{{"n": 2, "t": {T0 + 1}}}',
        '{"room": "attic"}',
        '{"n": 3, "t": "2025-11-25T00:00:00Z"}',
    ]
    script = f"import time\nfor line in {lines!r}: print(line)\ntime.sleep(60)\n"
    with running(tmp_path, script) as station, caplog.at_level(logging.WARNING):
        wait_until("three rows", lambda: station.store.last_row("sensor") == 3)
        assert numbers(station) == [1, 2, 3]
        wait_until("ten lines rejected", lambda: station.store.counters()["lines rejected"] == 10)
    assert "not stored" in caplog.text


def test_csv_lines_are_named_by_the_first_line_of_each_run(tmp_path: Path) -> None:
    # The first line comes alone.
    script = f"import time\nprint('room,n,t')\ntime.sleep(0.2)\nfor i in range(3): print(f'attic,{{i}},{{{T0} + i}}')\n"
    with running(tmp_path, script, format="csv", every=Duration(1.0)) as station:
        wait_until("two runs", lambda: station.store.last_row("sensor") >= 6)
        assert numbers(station)[:6] == [0, 1, 2, 0, 1, 2]
        assert counted(station, "program restarts")() == 0


def test_a_program_that_dies_at_once_is_started_again_ever_more_slowly_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = "import sys, time\nprint('sensor \\x1b[2J gone', file=sys.stderr)\nsys.exit(3)\n"
    with caplog.at_level(logging.WARNING), running(tmp_path, script) as station:
        wait_until("three restarts", lambda: counted(station, "program restarts")() >= 3)
    assert "exit code 3; started again in 0.05 s" in caplog.text
    assert "started again in 0.2 s" in caplog.text
    assert "sensor \\x1b[2J gone" in caplog.text


def test_a_silent_program_is_killed_with_its_children_and_started_again(tmp_path: Path) -> None:
    # Python may take longer to start than the timeout.
    script = 'trap "" TERM\nsleep 600 &\necho "$$ $!" >> pids\nwait\n'
    pids = tmp_path / "pids"
    with running(tmp_path, script, shell="/bin/sh", timeout=Duration(0.5)) as station:
        wait_until("it is found silent", lambda: counted(station, "program silent")() >= 1)
        # A slow one may be found silent before it writes.
        wait_until("the second start", lambda: pids.exists() and len(pids.read_text().splitlines()) >= 2)
    for pid in map(int, pids.read_text().split()):
        wait_until("the end of all its processes", partial(has_ended, pid))


def test_a_program_that_floods_is_held_back_and_loses_no_row(tmp_path: Path) -> None:
    script = "import time\nfor i in range(600): print('{\"n\": %d}' % i)\ntime.sleep(60)\n"
    with running(tmp_path, script, max_rate=100.0) as station:
        wait_until("it is held back", lambda: counted(station, "program held back")() >= 1)
        wait_until("all rows", lambda: station.store.last_row("sensor") == 600)
        assert numbers(station) == list(range(600))


def test_a_line_without_end_is_refused_without_taking_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import sys, time\n"
        "for _ in range(64): sys.stdout.write('x' * (1 << 20))\n"
        "print()\n"
        "print('{\"n\": 7}')\n"
        "time.sleep(60)\n"
    )
    with running(tmp_path, script) as station:
        wait_until("the row after it", lambda: station.store.last_row("sensor") == 1)
        assert numbers(station) == [7]
        assert station.store.counters()["lines rejected"] == 1


def test_a_program_gets_no_privilege_and_nothing_of_the_daemons_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/secret")
    script = (
        "import json, os, time\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status') if ':' in line)\n"
        "files = [os.readlink(f'/proc/self/fd/{fd}') for fd in ('0', '1', '2')]\n"
        "seen = {'nnp': status['NoNewPrivs'].strip(), 'env': sorted(os.environ), 'sid': os.getsid(0), "
        "'pid': os.getpid(), 'files': len(os.listdir('/proc/self/fd')), 'stdin': files[0]}\n"
        "open('new', 'w').write(json.dumps(seen)); os.rename('new', 'seen')\n"
        "time.sleep(60)\n"
    )
    with running(tmp_path, script):
        wait_until("its report", (tmp_path / "seen").exists)
    seen = json.loads((tmp_path / "seen").read_text())
    assert (seen["nnp"], seen["stdin"]) == ("1", "/dev/null")
    assert seen["files"] <= 4
    assert set(seen["env"]) <= {*program._ENVIRONMENT, "PYTHONUNBUFFERED", "LC_CTYPE"}
    assert seen["sid"] == seen["pid"]


def test_errors_are_logged_within_bounds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = (
        "import sys, time\n"
        "for _ in range(5000): print('e' * 5000, file=sys.stderr)\n"
        "print('{\"n\": 1}')\n"
        "time.sleep(60)\n"
    )
    with caplog.at_level(logging.WARNING), running(tmp_path, script) as station:
        wait_until("its row", lambda: station.store.last_row("sensor") == 1)
    assert sum(len(record.getMessage()) for record in caplog.records) < 20 * 400
    assert "e" * 200 in caplog.text


def test_of_a_stream_with_protected_fields_no_text_of_the_program_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = (
        "import sys, time\n"
        "print('n is 71.3571', file=sys.stderr)\n"
        "print('{\"71.3571\": 1}')\n"
        'print(\'{"n": "71.3571"}\')\n'
        "print('{\"n\": 1}')\n"
        "time.sleep(60)\n"
    )
    with caplog.at_level(logging.WARNING), running(tmp_path, script, privacy=StreamPrivacy(private=["n"])) as station:
        wait_until("the row", lambda: station.store.last_row("sensor") == 1)
        wait_until("its errors", lambda: "error text is left out" in caplog.text)
    assert "71.3571" not in caplog.text


def test_a_stop_ends_the_program_and_stores_what_it_printed(tmp_path: Path) -> None:
    script = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\nprint('{\"n\": 1}')\ntime.sleep(600)\n"
    with running(tmp_path, script) as station:
        wait_until("the row", lambda: station.store.last_row("sensor") == 1)
        begin = time.monotonic()
    assert time.monotonic() - begin < 15
    assert has_ended(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("command", "problem"),
    [(["no-such-program"], "no such program"), (["{folder}/open.py"], "everybody may change")],
)
def test_check_refuses_a_program_that_is_missing_or_that_everybody_may_change(
    tmp_path: Path, command: list[str], problem: str
) -> None:
    (tmp_path / "open.py").write_text("#!/usr/bin/python3\n")
    os.chmod(tmp_path / "open.py", 0o777)
    source = ExecSource(command=[part.format(folder=tmp_path) for part in command])
    made = conf(tmp_path, sensor=StreamConfig(fields=FIELDS, source=source))
    context = SourceContext(str(tmp_path / "outstation.toml"), made, "sensor")
    with pytest.raises(ConfigError, match=problem):
        exec_source.build(context, source, None)  # type: ignore[arg-type]


def test_what_a_held_back_program_has_printed_is_stored_when_the_daemon_stops(tmp_path: Path) -> None:
    # Lines wait in the pipe, in the reader and for the next commit, which is a minute away.
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit())\n"
        "for i in range(2000): print('{\"n\": %d}' % i)\n"
        "open('done', 'w').close()\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "sensor.py").write_text(script)
    made = ExecSource(command=[sys.executable, "sensor.py"], max_rate=10.0)
    stream = StreamConfig(fields=FIELDS, source=made, duplicates="accept")
    station = Station(
        conf(tmp_path / "data", 60.0, sensor=stream),
        sources=lambda store: [ProgramReader("sensor", stream, made, store, tmp_path)],
    )
    with contextlib.closing(station.store):
        station.intake.start()
        wait_until("all is printed", lambda: (tmp_path / "done").exists())
        station.intake.stop()
        assert numbers(station) == list(range(2000))


def test_lines_that_cannot_be_stored_in_time_at_a_stop_are_counted_as_lost(tmp_path: Path) -> None:
    script = "import time\nfor i in range(100): print('{\"n\": %d}' % i)\nopen('done', 'w').close()\ntime.sleep(60)\n"
    (tmp_path / "sensor.py").write_text(script)
    made = ExecSource(command=[sys.executable, "sensor.py"])
    stream = StreamConfig(fields=FIELDS, source=made, duplicates="accept")

    async def stop_before_any_commit(store: Store) -> None:
        async def submit(stream: str, raw: RawColumns, *_: object, **__: object) -> CommitOutcome:
            submitted.append(raw.n)
            await asyncio.sleep(60)
            raise AssertionError

        reader = ProgramReader("sensor", stream, made, store, tmp_path)
        task = asyncio.create_task(reader.run(submit))
        async with asyncio.timeout(30):
            while not submitted or not (tmp_path / "done").exists():
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])

    submitted: list[int] = []
    with open_store(tmp_path / "data") as store:
        asyncio.run(stop_before_any_commit(store))
        assert store.counters()["program lines lost.sensor"] == 100
