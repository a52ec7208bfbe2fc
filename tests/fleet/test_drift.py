"""Fleet drift: exact merges, each window once, outlier devices, onset order."""

from __future__ import annotations

import json
import random
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from outstation.evidence.gather.drift import build_drift
from outstation.fleet.audit.audit import audit
from outstation.fleet.cli.drift_report import build_document
from outstation.fleet.cli.group import fleet
from outstation.fleet.database.drift_windows import load_observed_periods
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.drift import survey
from outstation.fleet.drift.merge import MergedField
from outstation.fleet.drift.outliers import find_outliers
from outstation.fleet.drift.survey import FleetDriftSummary, build_timeline, summarize_drift
from outstation.fleet.workers import device_ranges as workers
from outstation.foundation import clock
from outstation.ml.comparison.tally import merge_moments
from outstation.ml.plots.drift_plot import NEAREST, FieldScale, plot_device
from outstation.protocol.wire.messages import DriftPayload, Moments
from outstation.protocol.wire.verification import decode
from outstation.workbench.testing.messages import MODEL, MessageSender, SignedMessage, new_key
from tests.kit.fleet_databases import allow_nulls

NOW_US = 1_795_000_000_000_000
NOW = clock.to_rfc3339(NOW_US)
BOUNDS = np.linspace(-4, 4, 33)
MINUTE_US = 60_000_000
SVG = "{http://www.w3.org/2000/svg}"


def field(rows: Any, state: str = "ok", **more: Any) -> dict[str, Any]:
    """Return the members of one field in a drift message, from its rows."""
    rows = np.asarray(rows, np.float64)
    counts = np.histogram(rows, BOUNDS)[0]
    mean = float(rows.mean()) if len(rows) else 0.0
    report = {
        "counts": counts.tolist(), "missing": 0, "below": int((rows < BOUNDS[0]).sum()),
        "above": int((rows > BOUNDS[-1]).sum()), "mean": mean, "m2": float(((rows - mean) ** 2).sum()),
        "cusum": {"mean": [0.0, 0.0], "spread": [0.0, 0.0]}, "state": state, "fault": None,
    }  # fmt: skip
    return {**report, **more}


def window(
    sender: MessageSender,
    at: int,
    fields: dict[str, Any],
    *,
    reference: str | dict[str, str | None] = "sha256:01",
    **changes: Any,
) -> SignedMessage:
    """Return the drift window of minute `at`, the next message of the sender."""
    begin = NOW_US - 1000 * MINUTE_US + at * MINUTE_US
    span = {"from": clock.to_rfc3339(begin), "to": clock.to_rfc3339(begin + MINUTE_US - 1)}
    states = {report.get("state") for report in fields.values()}
    body: dict[str, Any] = {
        "model": MODEL,
        "reference": reference if isinstance(reference, dict) else {"shipped": reference, "site": None},
        "window": {"index": at + 1, "rows": [2000 * at + 1, 2000 * at + 2000], "n": 2000, **span},
        "features": fields,
        "output": {"counts": {"PEN": 20}, "psi": 0.1, "state": "ok"},
        "estimate": {"accuracy": 0.9, "low": 0.8, "high": 1.0},
        "state": next((s for s in ("fault", "drift", "insufficient", "ok") if s in states), "ok"),
    }
    return sender.append("drift", task=sender.task, **{**body, **changes})


def add(store: FleetStore, sender: MessageSender, *sent: SignedMessage) -> None:
    store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
    store.ingest([Arrival(sender.verify(item)) for item in sent], [], NOW)


def seen(store: FleetStore, **options: Any) -> FleetDriftSummary:
    return summarize_drift(store, now_us=NOW_US, **options)


def devices(count: int) -> list[MessageSender]:
    return [MessageSender(f"pi-{i:02d}", new_key(i + 1), f"5f0c2f6e-1a54-4d0b-9a53-{i:012d}") for i in range(count)]


Parts = list[list[float]]
numbers = st.lists(st.lists(st.floats(-1e6, 1e6), max_size=20), min_size=1, max_size=8)


def moments(rows: list[float]) -> Moments:
    mean = float(np.mean(rows)) if rows else 0.0
    return Moments(len(rows), mean, float(((np.array(rows) - mean) ** 2).sum()))


@given(numbers, st.randoms(use_true_random=False))
def test_moments_merge_to_those_of_all_rows_in_any_order_and_grouping(parts: Parts, rng: random.Random) -> None:
    waiting = [moments(rows) for rows in parts]
    while len(waiting) > 1:
        a, b = (waiting.pop(rng.randrange(len(waiting))) for _ in range(2))
        waiting.append(merge_moments(a, b))
    everything = [x for rows in parts for x in rows]
    expected, scale = moments(everything), max(map(abs, everything), default=0.0)
    assert waiting[0].n == expected.n
    assert waiting[0].mean == pytest.approx(expected.mean, rel=1e-9, abs=1e-12 * scale + 1e-300)
    assert waiting[0].m2 == pytest.approx(expected.m2, rel=1e-9, abs=1e-12 * scale**2 + 1e-300)


def test_fifty_devices_merged_in_any_order_equal_one_pass_over_all_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = {s.device: [rng.normal(i / 100, 1 + i / 200, (300, 2)) for _ in range(3)] for i, s in enumerate(devices(50))}
    documents = []
    for order in range(3):
        opened = FleetStore(tmp_path / f"{order}.db")
        fleet_of = devices(50)
        random.Random(order).shuffle(fleet_of)
        for sender in fleet_of:
            sent = [
                window(sender, i, {"ax": field(r[:, 0]), "ay": field(r[:, 1])})
                for i, r in enumerate(rows[sender.device])
            ]
            random.Random(order).shuffle(sent)
            add(opened, sender, *sent)
        [group] = seen(opened).groups
        documents.append({name: (p.counts.tolist(), p.missing, p.moments) for name, p in group.merge_fields().items()})
        opened.close()
    assert documents[0] == documents[1] == documents[2]
    everything = np.concatenate([item for parts in rows.values() for item in parts])
    for at, name in enumerate(("ax", "ay")):
        counts, _, merged = documents[0][name]
        expected = field(everything[:, at])
        assert counts == [expected["below"], *expected["counts"], expected["above"]]
        assert merged.n == len(everything)
        assert merged.mean == pytest.approx(expected["mean"], rel=1e-9)
        assert merged.m2 == pytest.approx(expected["m2"], rel=1e-9)


def test_processes_summarise_ranges_of_devices_to_the_same(store: FleetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, sender in enumerate(devices(4)):
        rows = np.random.default_rng(index).normal(0, 1, (5, 500))
        add(store, sender, *(window(sender, index + i, {"ax": field(rows[i])}) for i in range(5)))
    whole = seen(store)
    monkeypatch.setattr(survey, "_MIN_PARALLEL_MESSAGES", 1)
    monkeypatch.setattr(workers, "_MIN_MESSAGES", 1)
    two = seen(store, processes=2)
    assert len(workers.split_devices(store, 2, 2)) == 2
    assert build_document(two, None, {}) == build_document(whole, None, {})


def test_a_window_counts_once_in_any_log(store: FleetStore) -> None:
    [first] = devices(1)
    again = MessageSender(first.device, first.key, "5f0c2f6e-1a54-4d0b-9a53-7a4b3f0d9c22")
    rows = np.random.default_rng(1).normal(0, 1, (4, 500))
    sent = [window(first, i, {"ax": field(rows[i])}) for i in range(3)]
    add(store, first, *sent, *sent)
    # A restored store tests the same readings again, and continues.
    add(store, again, *(window(again, i, {"ax": field(rows[i])}) for i in range(1, 4)))
    result = seen(store)
    [group] = result.groups
    assert (group.windows, result.duplicates) == (4, 2)
    assert group.merge_fields()["ax"].moments.n == 2000


def test_a_device_with_another_reference_forms_its_own_group(store: FleetStore) -> None:
    rows = np.random.default_rng(1).normal(0, 1, 500)
    for number, sender in enumerate(devices(4)):
        reference = "sha256:02" if number == 2 else "sha256:01"
        add(store, sender, window(sender, 0, {"ax": field(rows)}, reference=reference))
    common, other = seen(store).groups
    assert (sorted(common.devices), common.differs_in) == (["pi-00", "pi-01", "pi-03"], None)
    assert (list(other.devices), other.differs_in) == (["pi-02"], "reference")
    assert common.merge_fields()["ax"].moments.n == 1500


def test_a_window_tested_against_two_site_references_counts_once(store: FleetStore) -> None:
    [first] = devices(1)
    again = MessageSender(first.device, first.key, "5f0c2f6e-1a54-4d0b-9a53-7a4b3f0d9c22")
    rows = np.random.default_rng(1).normal(0, 1, 500)
    for sender, site in ((first, None), (again, "sha256:ff")):
        add(store, sender, window(sender, 0, {"ax": field(rows)}, reference={"shipped": "sha256:01", "site": site}))
    result = seen(store)
    assert (result.groups[0].windows, result.duplicates, result.groups[0].merge_fields()["ax"].moments.n) == (1, 1, 500)


def test_a_device_with_other_bins_forms_its_own_group(store: FleetStore) -> None:
    rows = np.random.default_rng(1).normal(0, 1, 500)
    for number, sender in enumerate(devices(6)):
        report = field(rows) if number else field(rows, counts=[500])
        add(store, sender, window(sender, 0, {"ax": report}))
    result = seen(store)
    common, other = result.groups
    assert (sorted(common.devices), common.differs_in) == ([f"pi-0{i}" for i in range(1, 6)], None)
    assert (list(other.devices), other.differs_in) == (["pi-00"], "layout")
    assert (result.unreadable, common.merge_fields()["ax"].moments.n) == (0, 2500)


def test_a_device_with_invented_references_gets_only_a_few_groups(store: FleetStore) -> None:
    [sender] = devices(1)
    report = [window(sender, i, {f"f{i}": field(np.zeros(10))}, reference=f"sha256:{i % 3}") for i in range(30)]
    add(store, sender, *report)
    result = seen(store)
    assert (len(result.groups), result.unreadable) == (4, 26)


def test_a_window_with_a_sensor_fault_is_counted_but_not_merged(store: FleetStore) -> None:
    [sender] = devices(1)
    good, bad = np.zeros(100), np.full(100, 3.0)
    faulty = {"ax": field(bad, "fault", fault="stuck"), "ay": field(good)}
    add(store, sender, window(sender, 0, {"ax": field(good), "ay": field(good)}), window(sender, 1, faulty))
    [group] = seen(store).groups
    assert (group.windows, group.faulty) == (2, 1)
    assert group.merge_fields()["ax"].moments.mean == 0.0
    assert group.merge_fields()["ay"].moments.n == 100


def test_invalid_drift_windows_are_counted_and_left_out(store: FleetStore) -> None:
    [sender] = devices(1)
    rows = np.zeros(100)
    damaged: list[dict[str, Any]] = [
        {"ax": field(rows, counts=[-1] * 32)},
        {"ax": field(rows, m2=-1.0)},
        {"ax": field(rows, counts=[2**60] * 32)},
        {"ax": field(rows, mean="0")},
        {"ax": field(rows, counts=[])},
        {},
    ]
    good = window(sender, 0, {"ax": field(rows)})
    add(store, sender, good, *(window(sender, i + 1, fields) for i, fields in enumerate(damaged)), sender.drift())
    result = seen(store)
    assert result.unreadable == len(damaged) + 1
    assert [group.windows for group in result.groups] == [1]


def test_a_window_with_a_null_is_counted_and_left_out(tmp_path: Path) -> None:
    store = FleetStore(tmp_path / "fleet.db")
    [sender] = devices(1)
    add(store, sender, *(window(sender, i, {"ax": field([0.5])}) for i in range(2)))
    store.close()
    allow_nulls(tmp_path / "fleet.db")
    store = FleetStore(tmp_path / "fleet.db")
    for column in ("window_count", "first", "last", "from", "to", "reference"):
        with store.transaction() as db:
            former = db.execute(f'SELECT "{column}" FROM drift_windows WHERE seq = 1').fetchone()[0]
            db.execute(f'UPDATE drift_windows SET "{column}" = NULL WHERE seq = 1')
        result = seen(store)
        assert (result.unreadable, [group.windows for group in result.groups]) == (1, [1]), column
        with store.transaction() as db:
            db.execute(f'UPDATE drift_windows SET "{column}" = ? WHERE seq = 1', (former,))
    assert seen(store).unreadable == 0
    store.close()


def test_a_device_with_another_spread_or_mean_is_an_outlier(store: FleetStore) -> None:
    rng = np.random.default_rng(3)
    for number, sender in enumerate(devices(9)):
        ax = rng.normal(0, 0.6 if number == 4 else 1, 4000)
        ay = rng.normal(1.0 if number == 7 else 0, 1, 4000)
        add(store, sender, window(sender, 0, {"ax": field(ax), "ay": field(ay)}))
    result = seen(store).groups[0].find_outliers()
    assert {(item.device, item.field, item.statistic) for item in result} == {
        ("pi-04", "ax", "spread"),
        ("pi-07", "ay", "mean"),
    }
    spread = next(item for item in result if item.field == "ax")
    assert spread.z < -3.5
    assert spread.value == pytest.approx(0.6, abs=0.03)
    assert spread.fleet_median == pytest.approx(1.0, abs=0.03)
    assert spread.divergences["ks"] > 0.1


@pytest.mark.parametrize(
    ("usual", "odd", "statistic"),
    [
        ((5.0, 0.0), (0.0, 0.0), "mean"),
        ((5.0, 0.0), (5.0, 1.0), "spread"),
        ((5.0, 1.0), (5.0, 0.0), "spread"),
        ((101_325.0, 0.0), (101_328.0, 0.0), "mean"),
        ((0.0, 0.0), (1e-6, 0.0), "mean"),
    ],
    ids=["constant elsewhere", "moves among still ones", "still among moving ones", "far from zero", "near zero"],
)
@pytest.mark.parametrize("known", [True, False])
def test_a_constant_field_on_one_device_or_on_all_others_is_an_outlier(
    usual: tuple[float, float], odd: tuple[float, float], statistic: str, known: bool
) -> None:
    whole = {}
    for number in range(9):
        mean, sd = odd if number == 3 else usual
        whole[f"pi-0{number}"] = {"ax": MergedField(np.ones(34, np.int64), 0, Moments(1000, mean, sd * sd * 1000))}
    [item] = find_outliers(whole, {"ax": max(usual[1], odd[1])} if known else {})
    assert (item.device, item.statistic) == ("pi-03", statistic)
    assert (item.value, item.fleet_median) == pytest.approx((odd[statistic == "spread"], usual[statistic == "spread"]))
    assert 3.5 < abs(item.z) <= 99


def test_a_tiny_difference_is_no_outlier() -> None:
    alike = {
        f"pi-0{i}": {"ax": MergedField(np.ones(34, np.int64), 0, Moments(1000, 0.01 * (i == 3), 0.0))} for i in range(9)
    }
    assert find_outliers(alike, {"ax": 1.0}) == []
    assert find_outliers(alike) != []


def test_a_third_of_a_fleet_that_is_alike_is_another_kind_of_site_and_one_beyond_it_an_outlier() -> None:
    usual = [0.82 + 0.002 * i for i in range(10)]
    others = [1.0, 1.003, 1.006, 1.008, 1.01]

    def compare(sds: list[float]) -> list[str]:
        bins = np.ones(34, np.int64)
        fleet = {
            f"pi-{i:02}": {"wz": MergedField(bins, 0, Moments(1000, 0.0, 1000 * sd**2))} for i, sd in enumerate(sds)
        }
        return [outlier.device for outlier in find_outliers(fleet)]

    assert compare(usual + others) == []
    assert compare([*usual, *others, 4.0]) == ["pi-15"]
    # Up to a quarter of the devices.
    assert compare([*usual, *others[:3]]) == ["pi-12", "pi-11", "pi-10"]


@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_uniform_fleet_has_no_outliers(store: FleetStore, count: int) -> None:
    rng = np.random.default_rng(4)
    for sender in devices(count):
        add(store, sender, window(sender, 0, {"ax": field(rng.normal(0, 1, 2000)), "flat": field(np.zeros(2000))}))
    assert seen(store).groups[0].find_outliers() == []


def test_onsets_are_sorted_by_alarm_and_ended_ones_come_last(store: FleetStore) -> None:
    [item, two] = devices(2)
    # Per minute: state and CUSUM of the spread.
    ax = [("ok", 0), ("ok", 0), ("ok", 3), ("drift", 6), ("drift", 9), ("drift", 12)]
    ay = [("ok", 1), ("ok", 2), ("ok", 3), ("ok", 4), ("drift", 6), ("drift", 8)]
    az = [("ok", 4), ("drift", 6), ("drift", 3), ("ok", 0), ("ok", 0), ("ok", 0)]
    for sender, fields in ((item, {"ay": ay, "az": az}), (two, {"ax": ax, "ay": az})):
        windows = [
            {
                n: field(np.zeros(10), report[i][0], cusum={"mean": [0, 0], "spread": [0, report[i][1]]})
                for n, report in fields.items()
            }
            for i in range(6)
        ]
        # Different fields under one reference do not merge; here each device has its own.
        sent = [window(sender, i, fields, reference=f"sha256:{sender.device}") for i, fields in enumerate(windows)]
        add(store, sender, *sent)
    first, second = (group.ordered_episodes() for group in seen(store).groups)
    assert [(e.subject, e.test, e.ended is None) for e in first] == [("ay", "spread", True), ("az", "spread", False)]
    assert [(e.subject, e.ended is None) for e in second] == [("ax", True), ("ay", False)]
    assert (second[0].began, second[0].alarmed) == (
        NOW_US - 998 * MINUTE_US,
        NOW_US - 996 * MINUTE_US - 1,
    )


def test_only_windows_since_a_moment_and_of_a_task_are_taken(store: FleetStore) -> None:
    [sender] = devices(1)
    add(store, sender, *(window(sender, i, {"ax": field(np.zeros(10))}) for i in range(10)))
    since = clock.to_rfc3339(NOW_US - 995 * MINUTE_US)
    assert seen(store, since=since).groups[0].windows == 5
    assert seen(store, task="other").groups == []


def test_a_year_of_windows_gives_a_bounded_history(store: FleetStore) -> None:
    [sender] = devices(1)
    minutes = [*range(0, 525_600, 3000), -29_900_000]
    add(store, sender, *(window(sender, 40_000_000, {"ax": field([0.0])}, window=_at(m)) for m in minutes))
    result = summarize_drift(store, now_us=NOW_US + 400 * 1440 * MINUTE_US)
    spans = list(result.groups[0].history)
    assert 40 <= len(spans) <= 96
    assert sum(span.windows for *_, span in spans) == len(minutes) - 1
    assert result.groups[0].undated == 1


def _at(minute: int) -> dict[str, Any]:
    moment = clock.to_rfc3339(NOW_US + minute * MINUTE_US)
    return {"index": 1, "rows": [1, 2], "from": moment, "to": moment, "n": 2}


def test_the_course_of_a_device_stays_bounded_and_keeps_the_largest_sum(store: FleetStore) -> None:
    [sender] = devices(1)
    sums = [7.5 if i == 777 else 0.0 for i in range(2000)]
    report = [{"ax": field([0.0], cusum={"mean": [0, s], "spread": [0, 0]})} for s in sums]
    add(store, sender, *(window(sender, i, fields) for i, fields in enumerate(report)))
    line = build_timeline(store, seen(store).groups[0], sender.device, now_us=NOW_US + 2000 * MINUTE_US)
    assert line.windows == 2000
    assert len(line.points) < 480
    assert [p.subjects["ax"].mean for p in line.points if p.subjects["ax"].mean] == [7.5]


def test_a_timeline_omits_windows_of_an_unset_clock_if_others_exist(
    store: FleetStore,
) -> None:
    [sender] = devices(1)
    add(store, sender, window(sender, 0, {"ax": field([0.0])}, window=_at(-29_900_000)))
    group = seen(store).groups[0]
    assert len(build_timeline(store, group, sender.device, now_us=NOW_US).points) == 1
    add(store, sender, window(sender, 1, {"ax": field([0.0])}))
    [point] = build_timeline(store, group, sender.device, now_us=NOW_US).points
    assert point.t[0] == NOW_US - 999 * MINUTE_US


# --- the command ---


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(fleet, [str(arg) for arg in args])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert run("init", tmp_path / "acme", "--broker", "mqtt://127.0.0.1:1").exit_code == 0
    FleetStore(tmp_path / "acme" / "fleet.db").close()
    return tmp_path / "acme"


def filled(folder: Path, count: int = 5, fields: int = 2) -> None:
    """Store 12 windows per device; from minute 8 one field loses gain on a device, and sticks on another."""
    rng = np.random.default_rng(0)
    store = FleetStore(folder / "fleet.db")
    for number, sender in enumerate(devices(count)):
        sent = []
        for minute in range(12):
            report = {
                f"f{i}": field(rng.normal(0, 1, 400), "insufficient" if minute < 4 else "ok") for i in range(fields)
            }
            if minute >= 8 and number == 0:
                cusum = {"mean": [0, 0], "spread": [0, 3.0 * (minute - 7)], "limit": 5.0}
                report["f0"] = field(rng.normal(0, 0.5, 400), "drift" if minute > 8 else "ok", cusum=cusum)
            if minute >= 8 and number == 1:
                report["f0"] = field(np.zeros(400), "fault", fault="stuck")
            sent.append(window(sender, minute, report))
        if number == 0:
            sent.append(sender.alert(summary="f0: spread fell to 0.5 <of> this site's reference & more."))
        add(store, sender, *sent)
    store.close()


def test_an_empty_database_is_reported(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "drift.svg"
    report = run("drift", "--dir", folder, "--plot", picture)
    assert report.exit_code == 0, report.exception
    assert report.stdout.startswith("No drift window was collected for this task, device and time: a device sends one")
    assert json.loads(run("drift", "--dir", folder, "--json").stdout) == {
        "duplicate_windows": 0,
        "unreadable_windows": 0,
        "tasks": [],
    }
    assert [e.text for e in ET.parse(picture).iter(f"{SVG}text") if e.get("class") == "empty"] == [
        "No drift window was collected for this task, device and time."
    ]


def test_a_single_window_is_a_fleet_too(folder: Path, tmp_path: Path) -> None:
    store = FleetStore(folder / "fleet.db")
    [sender] = devices(1)
    add(store, sender, window(sender, 0, {"ax": field([0.5])}))
    store.close()
    report = run("drift", "--dir", folder, "--json", "--plot", tmp_path / "one.svg")
    [task] = json.loads(report.stdout)["tasks"]
    assert (task["windows"], task["features"]["ax"]["n"], task["features"]["ax"]["mean"]) == (1, 1, 0.5)
    assert task["first_onset"] is None
    ET.parse(tmp_path / "one.svg")


def test_the_report_names_the_first_onset_and_its_states(folder: Path) -> None:
    filled(folder)
    [task] = json.loads(run("drift", "--dir", folder, "--json").stdout)["tasks"]
    assert (task["first_onset"]["device"], task["first_onset"]["field"], task["first_onset"]["test"]) == (
        "pi-00",
        "f0",
        "spread",
    )
    assert task["features"]["f0"]["drift"] == ["pi-00"]
    assert task["features"]["f0"]["fault"] == ["pi-01"]
    assert task["sensor_fault_windows"] == 4
    assert task["accuracy"] == pytest.approx(0.9)
    assert sum(span["windows"] for span in task["history"]) == 60
    text = run("drift", "--dir", folder).stdout
    assert "first onset: f0 (spread) on pi-00" in text
    assert "5 devices, 60 windows, 4 of them left out for a sensor fault" in text
    [alone] = json.loads(run("drift", "--dir", folder, "--device", "pi-02", "--json").stdout)["tasks"]
    assert [d["device"] for d in alone["devices"]] == ["pi-02"]
    assert alone["features"]["f0"]["n"] == 4800
    assert alone["first_onset"] is None
    assert (alone["windows"], alone["sensor_fault_windows"]) == (12, 0)
    assert sum(span["windows"] for span in alone["history"]) == 12
    assert [name for span in alone["history"] for name in (*span["drift"], *span["fault"])] == []
    assert (alone["features"]["f0"]["drift"], alone["features"]["f0"]["fault"]) == ([], [])


def test_the_report_of_a_device_counts_no_window_of_another(folder: Path) -> None:
    store = FleetStore(folder / "fleet.db")
    for number, sender in enumerate(devices(2)):
        times = [0, 1, *([-29_900_000, 1] if number == 0 else [])]
        add(store, sender, *(window(sender, m, {"ax": field([0.0])}, window=_at(m)) for m in times))
    store.close()
    members = ("windows", "unsynced_windows")
    counts = {}
    for name in ("pi-00", "pi-01"):
        document = json.loads(run("drift", "--dir", folder, "--device", name, "--json").stdout)
        [task] = document["tasks"]
        counts[name] = [*(task[member] for member in members), document["duplicate_windows"]]
    assert counts == {"pi-00": [3, 1, 1], "pi-01": [2, 0, 0]}


@pytest.mark.parametrize(
    "wrong", [["--since", "yesterday"], ["--task", "exercize"], ["--plot", "drift.jpeg"], ["--device", "pi-9"]]
)
def test_a_wrong_option_is_refused_in_one_line(folder: Path, wrong: list[str]) -> None:
    filled(folder, count=1)
    result = run("drift", "--dir", folder, *wrong)
    assert result.exception is not None
    assert wrong[1] in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize("options", [[], ["--device", "pi-00"]])
def test_the_plot_shows_fault_drift_and_alert(folder: Path, tmp_path: Path, options: list[str]) -> None:
    filled(folder)
    result = run("drift", "--dir", folder, "--plot", tmp_path / "drift.svg", *options)
    assert result.exit_code == 0, result.exception
    root = ET.parse(tmp_path / "drift.svg").getroot()
    text = [element.text for element in root.iter(f"{SVG}text")]
    assert any("<of> this site's reference & more." in str(line) for line in text)
    classes = [element.get("class") for element in root.iter()]
    # The plot of one device has a row for all tests together, too.
    assert classes.count("field") == 2 + bool(options)
    assert classes.count("band-drift") == 1
    assert classes.count("raised") == (1 if options else 2)
    assert classes.count("limit") == 1 + bool(options)
    assert "estimate" in classes
    assert ("pi-01" in text) is not bool(options)


def test_what_is_expected_of_a_further_output_is_the_mean_over_the_fleet(folder: Path) -> None:
    store = FleetStore(folder / "fleet.db")
    for at, sender in enumerate(devices(2)):
        estimate = {"mae": 2.0 + 2 * at, "mae_low": 1.0, "mae_high": 9.0}
        output = {"state": "ok", "further": {"wear": {"state": "ok", "estimate": estimate}}}
        add(store, sender, window(sender, 0, {"ax": field([0.0, 1.0])}, output=output))
    [task] = build_drift(store, NOW_US)["tasks"]
    store.close()
    assert task["expected_outputs"] == {"wear": {"expected_accuracy": None, "expected_error": 3.0}}
    text = run("drift", "--dir", folder).output
    assert "; expected accuracy 0.90; wear expected error 3" in text


def further_outputs(*names: str) -> dict[str, Any]:
    estimated = {"state": "drift", "cusum": [9.0], "limit": 5.0, "estimate": {"mae": 2.0}}
    return {"state": "ok", "further": dict.fromkeys(names, estimated)}


@pytest.mark.attack("devices")
def test_outputs_that_a_device_makes_up_are_counted_and_hide_no_others(folder: Path) -> None:
    store = FleetStore(folder / "fleet.db")
    liar, *honest = devices(3)
    for at in range(4):
        output = further_outputs(*(f"a{at}-{i}" for i in range(16)))
        add(store, liar, window(liar, at, {"ax": field([0.0, 1.0])}, output=output))
    for sender in honest:
        add(store, sender, window(sender, 0, {"ax": field([0.0, 1.0])}, output=further_outputs("wear")))
    [group] = seen(store).groups
    [task] = build_drift(store, NOW_US)["tasks"]
    store.close()
    drift = group.devices[liar.device]
    assert (len(drift.outputs), drift.omitted_outputs, len(drift.episodes.last)) == (16, 48, 16)
    assert all(not span.expected.further for _, _, span in group.history)
    assert (len(task["expected_outputs"]), task["outputs_omitted"]) == (16, 49)
    assert "wear" in task["expected_outputs"]
    text = run("drift", "--dir", folder).output
    assert "49 reports of more outputs than a model may have, left out" in text
    assert text.count("  output ") == 1


@pytest.mark.parametrize("name", ["\x1b[31mwear", "Wear", "", "a b"])
def test_a_window_with_a_name_that_no_output_may_have_is_unreadable(store: FleetStore, name: str) -> None:
    sender = devices(1)[0]
    add(store, sender, window(sender, 0, {"ax": field([0.0, 1.0])}, output=further_outputs(name)))
    assert (seen(store).groups, seen(store).unreadable) == ([], 1)


# --- runs of quiet windows ---


def run_of(sender: MessageSender, windows: Sequence[SignedMessage], **columns: Any) -> SignedMessage:
    """Return the message of a run of these quiet windows, with one field ax; the next one of `sender`."""
    bodies = [decode(sent.payload) for sent in windows]
    spans = [body.window for body in bodies if isinstance(body, DriftPayload)]
    fields = [body.features["ax"] for body in bodies if isinstance(body, DriftPayload)]
    total = Moments()
    for entry in fields:
        total = merge_moments(
            total, Moments(sum(entry["counts"]) + entry["below"] + entry["above"], entry["mean"], entry["m2"])
        )
    merged = {
        **fields[-1],
        **{name: sum(entry[name] for entry in fields) for name in ("missing", "below", "above")},
        "counts": np.sum([entry["counts"] for entry in fields], axis=0).tolist(),
        "mean": total.mean,
        "m2": total.m2,
    }
    times = [(clock.parse_rfc3339(span.from_), clock.parse_rfc3339(span.to)) for span in spans]
    run = {
        "first": [span.rows[0] for span in spans],
        "last": [span.rows[1] for span in spans],
        "from": [begin for begin, _ in times],
        "to": [end for _, end in times],
        "n": [span.n for span in spans],
        "nearest": [0.1 * (i % 9) for i in range(len(spans))],
    }
    whole = {
        "index": spans[0].index,
        "rows": [spans[0].rows[0], spans[-1].rows[1]],
        "from": spans[0].from_,
        "to": spans[-1].to,
        "n": sum(span.n for span in spans),
    }
    body = json.loads(windows[-1].payload)
    members = {name: body[name] for name in ("model", "reference", "output", "estimate", "state")}
    features = {"ax": merged}
    return sender.append("drift", task=sender.task, **members, window=whole, features=features, windows=run | columns)


def two_thousand(seed: int, at: int, *, low: float = 0.0) -> Any:
    return np.random.default_rng(seed * 1000 + at).normal(low, 1.0, 2000)


def quiet_then_drift(sender: MessageSender, seed: int, *, runs: Sequence[tuple[int, int]]) -> list[SignedMessage]:
    """Return 40 quiet windows, of which some `runs` [begin, end) share a message, then two windows of drift."""
    alone = MessageSender(sender.device, sender.key, sender.log)
    singles = [window(alone, at, {"ax": field(two_thousand(seed, at))}) for at in range(40)]
    sent, at = [], 0
    while at < 40:
        end = next((end for begin, end in runs if begin == at), at + 1)
        if end - at > 1:
            sent.append(run_of(sender, singles[at:end]))
        else:
            sent.append(window(sender, at, {"ax": field(two_thousand(seed, at))}))
        at = end
    moved = {"cusum": {"mean": [9.0, 0.0], "spread": [0.0, 0.0], "limit": 5.0}}
    for at in (40, 41):
        sent.append(window(sender, at, {"ax": field(two_thousand(seed, at, low=1.0), "drift", **moved)}))
    return sent


def test_a_log_of_runs_and_single_windows_gives_the_survey_of_single_windows(
    fresh: Callable[[], FleetStore],
) -> None:
    surveys, documents = [], []
    for runs in ([], [(0, 40)], [(0, 3), (5, 6), (7, 30), (30, 39)]):
        opened = fresh()
        for seed, sender in enumerate(devices(5)):
            add(opened, sender, *quiet_then_drift(sender, seed, runs=runs))
        [group] = seen(opened).groups
        surveys.append(group)
        documents.append(build_drift(opened, NOW_US))
        assert audit(opened).passed
        assert {row["windows"] for row in opened.progress()} == {42}
        assert {count for *_, count in load_observed_periods(opened, "", "9")} == {42}
        line = build_timeline(opened, group, "pi-00", now_us=NOW_US)
        assert (line.windows, line.histograms["ax"]["ok"].windows, line.histograms["ax"]["drift"].windows) == (
            42,
            40,
            2,
        )
        assert int(line.histograms["ax"]["ok"].counts.sum()) == 40 * 2000
        assert [ongoing for _, _, ongoing in line.spells("ax", "drift")] == [True]
        opened.close()
    singles, *others = surveys
    for group in others:
        assert (group.windows, group.faulty, group.undated) == (singles.windows, 0, 0)
        assert group.windows == 5 * 42
        ours, theirs = group.merge_fields()["ax"], singles.merge_fields()["ax"]
        assert ours.counts.tolist() == theirs.counts.tolist()
        assert ours.moments.n == theirs.moments.n == 5 * 42 * 2000
        assert ours.moments.mean == pytest.approx(theirs.moments.mean, rel=1e-9)
        assert ours.moments.m2 == pytest.approx(theirs.moments.m2, rel=1e-9)
        assert group.estimate_performance().accuracy == pytest.approx(0.9)
        assert [(b, e, s.windows, s.drifting_devices) for b, e, s in group.history] == [
            (b, e, s.windows, s.drifting_devices) for b, e, s in singles.history
        ]
        assert [d.observed for d in group.devices.values()] == [d.observed for d in singles.devices.values()]
        for name in ("device", "subject", "test", "alarmed", "ended"):
            assert [getattr(e, name) for e in group.ordered_episodes()] == [
                getattr(e, name) for e in singles.ordered_episodes()
            ]
        assert [(o.device, o.field, o.statistic) for o in group.find_outliers()] == [
            (o.device, o.field, o.statistic) for o in singles.find_outliers()
        ]
    assert documents[0] == documents[1] == documents[2]


def test_the_current_state_is_that_of_the_last_windows_and_not_of_a_long_run(store: FleetStore) -> None:
    sender = MessageSender()
    add(store, sender, *quiet_then_drift(sender, 1, runs=[(0, 40)]))
    [group] = seen(store).groups
    assert group.merge_recent()["ax"].moments.n == 2 * 2000
    assert group.merge_recent()["ax"].moments.mean == pytest.approx(1.0, abs=0.1)


def test_windows_of_a_run_that_were_reported_before_count_once(store: FleetStore) -> None:
    """A store that was restored from a copy judges windows again, in other batches and another log."""
    sender = MessageSender()
    again = MessageSender(key=sender.key, log="5f0c2f6e-1a54-4d0b-9a53-0c61d3d8a8aa")
    alone = MessageSender()
    singles = [window(alone, at, {"ax": field(two_thousand(1, at))}) for at in range(40)]
    add(store, sender, run_of(sender, singles[:10]), run_of(sender, singles[10:20]))
    one_more = window(again, 12, {"ax": field(two_thousand(1, 12))})
    runs = [run_of(again, singles[begin:end]) for begin, end in ((0, 10), (15, 25), (25, 40))]
    add(store, again, one_more, *runs)
    survey = seen(store)
    [group] = survey.groups
    assert (group.windows, survey.duplicates) == (10 + 10 + 15, 10 + 1 + 10)
    assert group.merge_fields()["ax"].moments.n == 35 * 2000


def test_a_plot_of_runs_has_all_their_windows(store: FleetStore, tmp_path: Path) -> None:
    sender = MessageSender()
    add(store, sender, *quiet_then_drift(sender, 1, runs=[(0, 39)]))
    [group] = seen(store).groups
    line = build_timeline(store, group, sender.device, now_us=NOW_US)
    assert len(line.nearest) == 42
    rows, _ = plot_device(line, FieldScale(), {}, {})
    [nearest] = [row for row in rows if row.name == NEAREST]
    assert (nearest.limit, nearest.state, len(nearest.curves[0].values)) == (1.0, "drift", 42)
    assert nearest.curves[0].values[-1] == pytest.approx(9.0 / 5.0)
