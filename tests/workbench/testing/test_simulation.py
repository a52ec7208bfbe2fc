"""Simulated fleets on a virtual clock: what is injected is found, nothing is lost, and a seed repeats every byte."""

from __future__ import annotations

import contextlib
import errno
import logging
import resource
from pathlib import Path
from typing import Any

import msgspec
import pytest

from outstation.fleet.database.store import FleetStore
from outstation.fleet.usage import load_usages
from outstation.foundation.errors import ConfigError, UsageError
from outstation.workbench.cli import simulate_scenario
from outstation.workbench.testing.simulated_fleet import SimulatedFleet
from outstation.workbench.testing.simulation import scenario, setup, simulation_report
from outstation.workbench.testing.simulation.log import MachineLog, written_log
from outstation.workbench.testing.simulation.machine import MachineRoom
from outstation.workbench.testing.simulation.page import render
from outstation.workbench.testing.simulation.runner import Outcome, Simulation
from outstation.workbench.testing.simulation.scenario import Scenario

_FIELDS = {"watch": ["ax", "ay", "az", "wx", "wy", "wz"]}


def read(folder: Path, text: str) -> Scenario:
    file = folder / "scenario.toml"
    file.write_text(text, encoding="utf-8")
    return scenario.load(file, _FIELDS, {"exercise": 60.0})


def simulate(folder: Path, text: str) -> tuple[Outcome, dict[str, Any]]:
    """Run a scenario with the built-in task; return its outcome and its report."""
    folder.mkdir()
    chosen = read(folder, text)
    with contextlib.closing(Simulation(folder, chosen, setup.load(None, folder, {}, {}, ()))) as simulation:
        outcome = simulation.run()
        return outcome, simulation_report.build(chosen, outcome, simulation.store)


_ROUGH = """
seed = 5
duration = "8 min"
drain = "10 min"
groups.hall = { devices = 3, start_within = "30 s" }
network = { loss = 0.1, duplication = 0.1, delay_s = 2.0, disconnect = 0.01 }
events = [
  { kind = "power-cut", devices = ["hall-01"], at = "3 min", lasts = "40 s" },
  { kind = "outage", devices = ["hall-02"], at = "2 min", lasts = "5 min" },
  { kind = "collector-outage", at = "50 s", lasts = "30 s" },
  { kind = "clock", devices = ["hall-03"], at = "3 min", ahead = "3 h" },
]
"""


@pytest.mark.process
def test_a_rough_day_loses_nothing_and_repeats_every_byte(tmp_path: Path) -> None:
    first, document = simulate(tmp_path / "a", _ROUGH)
    again, repeated = simulate(tmp_path / "b", _ROUGH)
    assert first.audit.passed, first.audit.to_dict()
    assert first.undelivered == []
    assert first.messages > 60
    assert (again.digest, again.messages, again.rows) == (first.digest, first.messages, first.rows)
    assert repeated["events"] == document["events"]
    answers = {event["kind"]: {(each["device"], each["by"]) for each in event["found"]} for event in document["events"]}
    assert answers["outage"] == {("hall-02", "collector")}
    assert answers["clock"] == {("hall-03", "device")}
    assert (document["passed"], document["false_alarms"]["n"]) == (True, 0)
    with contextlib.closing(FleetStore(tmp_path / "a" / "fleet" / "fleet.db", read_only=True)) as store:
        boot = "CAST(json_extract(CAST(payload AS TEXT), '$.boot') AS INTEGER)"
        boots = store.fetch_all(f"SELECT DISTINCT device, {boot} FROM messages ORDER BY 1, 2")
        unexplained = simulation_report.build(
            read(tmp_path, _ROUGH), msgspec.structs.replace(first, injected=[]), store
        )
        assert {device for device, _ in store.newest_logs()} == {*first.devices}
        assert len(store.newest_logs()) == len(first.devices)
        usages = load_usages(store)
    for usage in usages.values():
        assert usage is not None
        assert (usage.cpu_s, usage.energy_j) == (None, None)
        # What a device stated first; it writes each message that it sends.
        assert 60 <= usage.seconds <= 120
        assert 3 < usage.inferences < 120
        assert 1000 < usage.air_bytes < usage.flash_bytes < 20e6
    # The killed device went on from its store: the same log, the next boot.
    assert [tuple(row) for row in boots] == [("hall-01", 1), ("hall-01", 2), ("hall-02", 1), ("hall-03", 1)]
    assert (unexplained["passed"], unexplained["false_alarms"]["n"]) == (False, 3)
    assert "more false alarms than the budget" in render(unexplained)


@pytest.mark.process
def test_without_a_drain_only_devices_with_messages_left_count_as_undelivered(tmp_path: Path) -> None:
    outage = '{ kind = "outage", devices = ["hall-02"], at = "1 s", lasts = "5 s" }'
    text = f'seed = 5\nduration = "7 s"\ndrain = "0 s"\ngroups.hall = {{ devices = 2 }}\nevents = [{outage}]\n'
    outcome, _ = simulate(tmp_path / "a", text)
    assert outcome.undelivered == ["hall-02"]


def write_slow_rows(folder: Path) -> Path:
    """Write a row a second: few enough bytes that a device commits them to its journal."""
    table = folder / "slow.csv"
    names = _FIELDS["watch"]
    rows = [",".join(str((row * (i + 3)) % 7) for i in range(len(names))) for row in range(300)]
    table.write_text("\n".join([",".join(names), *rows, ""]), encoding="utf-8")
    return table


@pytest.mark.process
def test_a_full_disk_behind_small_commits_is_survived_and_the_page_shows_each_setting(tmp_path: Path) -> None:
    chosen = read(
        tmp_path,
        """
        duration = "4 min"
        [groups.hall]
        devices = 2
        [budget]
        false_alarms = 10
        [[events]]
        kind = "full-disk"
        devices = ["hall-01"]
        at = "1 min"
        lasts = "1 min"
        [[events]]
        kind = "clock"
        devices = ["hall-02"]
        at = "1 min"
        behind = "2 h"
        synced = false
        [[events]]
        kind = "gain"
        fields = ["ax"]
        at = "2 min"
        over = "90 s"
        amount = 3.0
        """,
    )
    recordings = {"watch": (write_slow_rows(tmp_path), ())}
    with (
        contextlib.closing(Simulation(tmp_path, chosen, setup.load(None, tmp_path, {}, recordings, ()))) as simulation,
        written_log(simulation.room, tmp_path / "simulation.log"),
    ):
        outcome = simulation.run()
        document = simulation_report.build(chosen, outcome, simulation.store)
    assert outcome.audit.passed, outcome.audit.to_dict()
    # The recording goes on through the full disk: its rows are stored when there is space again.
    assert outcome.rows["watch"].accepted >= 2 * 228
    assert [event["settings"] for event in document["events"]] == [
        {},
        {"behind": 7200.0, "synced": False},
        {"fields": ["ax"], "amount": 3.0, "over": 90.0},
    ]
    log = (tmp_path / "simulation.log").read_text(encoding="utf-8")
    assert "1 min 00 s hall-02: warning: the clock was set by -7200.0 s" in log
    page = render(msgspec.json.decode(msgspec.json.encode(document)))
    assert "behind 2 h, synced false" in page
    assert "fields ax, amount 3.0, over 1 min 30 s" in page


@pytest.mark.parametrize(
    ("bundle", "problem"),
    [
        ("nothing", r"--bundle exercise=nothing: nothing: "),
        ("solar", r"tasks\.exercise.*bundle solar needs numeric field 'ghi', stream 'watch' has none"),
    ],
)
def test_a_bundle_that_no_device_would_run_is_refused_before_the_run(tmp_path: Path, bundle: str, problem: str) -> None:
    with pytest.raises((ConfigError, UsageError), match=problem):
        setup.load(None, tmp_path, {"exercise": bundle}, {}, ())


@pytest.mark.process
def test_a_device_stores_the_first_row_of_its_recording(tmp_path: Path) -> None:
    with contextlib.closing(SimulatedFleet(tmp_path, scenario={"groups": {"hall": {"devices": 2}}})) as fleet:
        fleet.run("15 s")
        devices = fleet._simulation.devices.values()
        read_counts = [device._feeds["watch"]._count for device in devices]
    assert [device.rows["watch"].accepted for device in devices] == read_counts
    assert min(read_counts) > 50


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        ('events = [{ kind = "gain", at = "2 h", fields = ["ax"] }]', r"events\[0\]\.at: after the end"),
        ('events = [{ kind = "gain", at = "2 s", fields = ["xa"] }]', r"events\[0\]\.fields: no field 'xa'"),
        ('events = [{ kind = "outage", at = "2 s", group = "si" }]', r"events\[0\]\.group: no group 'si'"),
        (
            'events = [{ kind = "outage", at = "2 s", expect = ["drfit"] }]',
            r"\.expect: .*'drfit'; did you mean 'drift'",
        ),
        ('events = [{ kind = "outage", at = "2 s", amount = 2 }]', r"\.amount: unknown key; sections of another kind"),
        ('events = [{ kind = "gain", at = "2 s", fields = ["ax"] }]', r"\.amount: gain by 1 changes nothing"),
        ('events = [{ kind = "spikes", at = "2 s", fields = ["ax"] }]', r"\.amount: spikes by 0 changes nothing"),
        ('events = [{ kind = "noise", at = "2 s", fields = ["ax"], amount = -1 }]', r"noise needs an amount above 0"),
        ('events = [{ kind = "offset", at = "2 s", fields = ["ax"], amount = nan }]', r"\[0\]\.amount: is nan"),
        ('events = [{ kind = "outage", at = "2 s", devices = [] }]', r"\.devices: must have at least 1 entry"),
        ('events = [{ kind = "clock", at = "2 s" }]', r"events\[0\]: a clock is either ahead or behind"),
        ('events = [{ kind = "clock", at = "2 s", ahead = "2 h", behind = "1 h" }]', r"either ahead or behind"),
        ('events = [{ kind = "clock", at = "2 s", ahead = "27000 d" }]', r"events\[0\]\.ahead: .* after 2100"),
        ('events = [{ kind = "outage", at = "2 s", devices = ["x*"] }]', r"events\[0\]\.devices: no device"),
        ('events = [{ kind = "outrage", at = "2 s" }]', "outrage"),
        ('start = "2020-01-01T00:00:00Z"', "start: before"),
        ('start = "9999-06-01T00:00:00Z"', "start: the run would end after 2100"),
        ('start = "2099-12-31T23:00:00Z"', "start: the run would end after 2100"),
        ("labels.sense = {}", r"labels\.sense: no task 'sense'"),
        ("seeds = 3", "seeds"),
        ("network.loss = 2", r"network\.loss: must be at most 1"),
        ("network.los = 0.2", r"network\.los: unknown key; did you mean 'loss'"),
    ],
)
def test_an_error_of_a_scenario_is_one_line_with_file_and_key(tmp_path: Path, rest: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        read(tmp_path, f'duration = "1 h"\n{rest}')
    assert str(caught.value).startswith(str(tmp_path / "scenario.toml"))
    assert "\n" not in str(caught.value)


def test_no_field_is_missing_that_every_row_must_have(tmp_path: Path) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text('duration = "1 h"\nevents = [{ kind = "missing", at = "2 s", fields = ["ax", "ay"] }]')
    with pytest.raises(ConfigError, match=r"events\[0\]\.fields: watch\.ay is not optional, so rows") as caught:
        scenario.load(file, _FIELDS, {"exercise": 60.0}, optional={"watch": ["ax"]})
    assert str(caught.value).endswith('set [streams.watch] fields = [{ name = "ay", optional = true }, …]')
    assert scenario.load(file, _FIELDS, {"exercise": 60.0}, optional={"watch": ["ax", "ay"]}).events


@pytest.mark.parametrize(("stream", "is_accepted"), [("a", True), ("b", False), ("", False)])
def test_a_field_that_only_another_stream_may_lack_is_never_missing(
    tmp_path: Path, stream: str, is_accepted: bool
) -> None:
    file = tmp_path / "scenario.toml"
    event = f'{{ kind = "missing", at = "2 s", stream = "{stream}", fields = ["x"] }}'
    file.write_text(f'duration = "1 h"\nevents = [{event}]')
    with contextlib.nullcontext() if is_accepted else pytest.raises(ConfigError, match=r"b\.x is not optional"):
        scenario.load(file, {"a": ["x"], "b": ["x"]}, {"exercise": 60.0}, optional={"a": ["x"], "b": []})


def test_a_recording_without_the_fields_of_the_stream_is_named(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("t,a,b\n" + "".join(f"{i},{i % 7},{i % 5}\n" for i in range(100)), encoding="utf-8")
    with pytest.raises(UsageError, match=r"rows\.csv: 2 columns are named, the stream has 6 fields"):
        setup.load(None, tmp_path, {}, {"watch": (table, ["a", "b"])}, ())
    with pytest.raises(UsageError, match="no stream 'wach'"):
        setup.load(None, tmp_path, {}, {"wach": (table, ["a"])}, ())


def test_the_limit_of_open_files_stays_raised_between_the_steps(tmp_path: Path) -> None:
    """The devices' files stay open, and the test opens files of its own."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    chosen = read(tmp_path, 'duration = "1 h"\ngroups.hall = { devices = 100 }')
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
        with contextlib.closing(Simulation(tmp_path, chosen, setup.load(None, tmp_path, {}, {}, ()))) as simulation:
            with simulation.room.installed():
                pass
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.process
def test_a_wait_ends_with_an_alert_of_the_collector_though_no_message_comes(tmp_path: Path) -> None:
    silence = {"groups": {"hall": {"devices": 1}}, "events": [{"kind": "outage", "at": "1 min"}]}
    with contextlib.closing(SimulatedFleet(tmp_path, scenario=silence)) as fleet:
        assert fleet.wait_for(alert="connection", within="6 min")["device"] == "hall-01"


def test_names_of_no_device_and_numbers_of_devices_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="groups: 0 devices; must be from 1 to 10000"):
        SimulatedFleet(tmp_path / "none", devices=0)
    (tmp_path / "hall.toml").write_text('duration = "1 h"\ngroups.hall = { devices = 1 }\n', encoding="utf-8")
    with contextlib.closing(SimulatedFleet(tmp_path / "one", scenario=str(tmp_path / "hall.toml"))) as fleet:
        for act in (lambda: fleet.wait_for("ax", device="hall-1", within="1 s"), lambda: _cut(fleet, "hall-02")):
            with pytest.raises(UsageError, match=r"no device 'hall-0?[12]'; did you mean 'hall-01'\?"):
                act()
        with pytest.raises(UsageError, match="no device 'hall-7'"):
            fleet.alerts("hall-7")
        with pytest.raises(UsageError, match="state 'raisd': an alert is raised or cleared; did you mean 'raised'"):
            fleet.wait_for("ax", within="1 s", state="raisd")
        assert fleet.now_s == 0.0


def _cut(fleet: SimulatedFleet, device: str) -> None:
    fleet.set_offline(device, is_offline=True)


def test_a_full_disk_under_the_log_is_no_failure_of_a_machine(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    machine_log = logging.getLogger("outstation.full")
    machine_log.addHandler(handler := MachineLog(MachineRoom(1, 0), refuse))
    try:
        machine_log.warning("the broker is gone")
    finally:
        machine_log.removeHandler(handler)
    assert "No space left on device" in capsys.readouterr().err


def test_the_summary_says_that_devices_rejected_the_labels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document: dict[str, Any] = {
        "events": [],
        "rollouts": [],
        "missed": 0,
        "problems": ["Devices rejected all 610 labels of task tiny: up is no class."],
        "warnings": ["Devices rejected 3 of 9 rows of stream sensor, the first: nan."],
        "devices": 1,
        "messages": 9,
    }
    document |= {"false_alarms": {"n": 0, "budget": 0, "alerts": []}, "simulated_seconds": 9.0, "seconds": 1.0}
    document |= {"messages_per_second": 9.0, "peak_bytes": 9}
    document["audit"] = {}
    monkeypatch.setattr(simulate_scenario, "print_audit", lambda *_: None)
    simulate_scenario._print_scenario(document)
    shown = capsys.readouterr().out
    assert "warning: Devices rejected 3 of 9 rows of stream sensor, the first: nan." in shown
    assert "not passed: Devices rejected all 610 labels of task tiny: up is no class." in shown
