"""Alert rules in batches: raised and cleared once, in the commit of the results that they are about."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from outstation.device.config.alert_rules import AlertRuleConfig
from outstation.device.config.tasks import TaskConfig
from outstation.device.rules import batch_rules, rule_store
from outstation.device.rules.batch_results import BatchResults
from outstation.device.rules.batch_rules import TaskRuleStates
from outstation.foundation.config.quantities import Duration
from outstation.foundation.errors import StorageFull
from outstation.ml.drift.state import DriftState
from outstation.protocol.wire.messages import AlertPayload, ResultsPayload
from scripts.kit.bundles import ANOMALY, CENTRES, CLASSIFY, FLOAT, REGRESS, SEVERAL, Floats, Recipe, activated
from tests.kit.devices import NOW, Device

FALL = AlertRuleConfig(
    name="fall",
    label="left",
    for_="3 of 5",
    severity="critical",
    summary="{device}: {task} says {label}, {score} sure, at {time}",
)


def rows_of(text: str) -> Floats:
    """Return one row for each letter: l, r and - are the centres of left, right and rest."""
    return CENTRES[["lr-".index(letter) for letter in text]]


@pytest.fixture
def make_device(tmp_path: Path) -> Iterator[Callable[..., Device]]:
    made: list[Device] = []

    def make(*alerts: AlertRuleConfig, recipe: Recipe = CLASSIFY, name: str = "data") -> Device:
        made.append(Device(tmp_path / name, recipe, activated(recipe), alerts=list(alerts)))
        return made[-1]

    yield make
    for device in made:
        device.store.close()


def alerts(device: Device) -> list[AlertPayload]:
    bodies = [message.body for message in device.messages()]
    return [body for body in bodies if isinstance(body, AlertPayload) and body.alert == "result"]


def states(device: Device) -> list[tuple[str, str, str, object]]:
    return [(alert.id, alert.state, alert.severity, alert.evidence.get("row")) for alert in alerts(device)]


def run_in_parts(device: Device, rows: Floats, sizes: Sequence[int]) -> None:
    begin = 0
    for size in itertools.chain(sizes, itertools.repeat(len(rows))):
        if begin >= len(rows):
            return
        device.feed(rows[begin : begin + size])
        device.run_all()
        begin += size


def test_a_class_raises_an_alert_with_the_sentence_of_the_config_and_clears_it(
    make_device: Callable[..., Device],
) -> None:
    device = make_device(FALL)
    device.feed(rows_of("rl-l-lrrrrrr"))
    device.run_all()
    raised, cleared = alerts(device)
    assert states(device) == [
        ("tiny/fall/result/1", "raised", "critical", 6),
        ("tiny/fall/result/1", "cleared", "info", 11),
    ]
    assert (raised.task, raised.subject, raised.alert) == ("tiny", "fall", "result")
    assert raised.summary.startswith("pi-07: tiny says left, 0.")
    assert raised.summary.endswith(" sure, at 2025-11-24T16:00:00.050000Z")
    assert (raised.evidence["hits"], raised.evidence["of"], raised.evidence["label"]) == (3, 5, "left")
    assert cleared.summary == "tiny: fall is over: 5 results in a row have no label 'left'."
    [results] = [message.body for message in device.messages() if isinstance(message.body, ResultsPayload)]
    assert raised.evidence["seq"] == cleared.evidence["seq"] == results.seq
    assert [entry["id"] for entry in device.store.open_alerts("tiny")] == []


def test_an_open_alert_is_shown_until_it_clears_and_survives_a_restart(make_device: Callable[..., Device]) -> None:
    device = make_device(FALL)
    device.feed(rows_of("lll"))
    device.run_all()
    assert [entry["id"] for entry in device.store.open_alerts("tiny")] == ["tiny/fall/result/1"]
    device.restart()
    device.feed(rows_of("lll----"))
    device.run_all()
    assert [state for _, state, *_ in states(device)] == ["raised"]
    device.restart()
    device.feed(rows_of("-lll"))
    device.run_all()
    assert [(identity, state) for identity, state, *_ in states(device)] == [
        ("tiny/fall/result/1", "raised"),
        ("tiny/fall/result/1", "cleared"),
        ("tiny/fall/result/2", "raised"),
    ]


def test_splitting_the_rows_into_batches_changes_no_alert(make_device: Callable[..., Device]) -> None:
    random = np.random.default_rng(5)
    rows = rows_of("".join(random.choice(list("llr-"), 400)))
    rules = [
        FALL,
        AlertRuleConfig(name="any", labels=["left", "rest"], for_="6 of 8", hold=Duration(0.1)),
        AlertRuleConfig(name="long", labels=["right", "rest"], for_="20 ms"),
        AlertRuleConfig(name="same", unchanged="4 windows", only_healthy=True),
    ]
    whole = make_device(*rules, name="whole")
    run_in_parts(whole, rows, [])
    expected = sorted(states(whole))
    assert {identity.split("/")[1] for identity, *_ in expected} == {"fall", "any", "long", "same"}
    for number, sizes in enumerate(([1] * 30, [7, 100, 3], [250])):
        parts = make_device(*rules, name=f"parts{number}")
        run_in_parts(parts, rows, sizes)
        assert sorted(states(parts)) == expected


def test_a_batch_that_is_not_committed_raises_nothing_and_its_repetition_raises_it_once(
    make_device: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_device(FALL)
    device.feed(rows_of("lllll"))
    save = rule_store.save

    def fail(*_: object) -> None:
        save(*_)  # type: ignore[arg-type]
        raise StorageFull("no room")

    monkeypatch.setattr(rule_store, "save", fail)
    with pytest.raises(StorageFull):
        device.run()
    assert device.messages() == []
    monkeypatch.undo()
    device.restart()
    device.run_all()
    assert [state for _, state, *_ in states(device)] == ["raised"]


@pytest.mark.parametrize("restarts", range(4))
def test_reopening_the_store_after_every_batch_changes_no_alert(
    make_device: Callable[..., Device], restarts: int
) -> None:
    device = make_device(FALL)
    for part in ["ll", "l", "rr", "rrr", "-lll", "----------"]:
        device.feed(rows_of(part))
        device.run_all()
        for _ in range(restarts):
            device.restart()
    assert [(state, row) for _, state, _, row in states(device)] == [
        ("raised", 3),
        ("cleared", 8),
        ("raised", 12),
        ("cleared", 17),
    ]


# --- the config changes ---


def reconcile(device: Device, rules: list[AlertRuleConfig] | None) -> int:
    tasks = {} if rules is None else {"tiny": TaskConfig(stream="watch", bundle="tiny", alerts=rules)}
    return rule_store.reconcile(device.store, device.author, tasks, NOW)


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ([], "was removed"),
        (None, "was removed"),
        ([msgspec.structs.replace(FALL, for_="2 of 5")], "was changed"),
        ([msgspec.structs.replace(FALL, summary="other words")], "was changed"),
    ],
)
def test_a_rule_that_is_removed_or_changed_clears_its_alert_once_and_says_so(
    make_device: Callable[..., Device], rules: list[AlertRuleConfig] | None, reason: str
) -> None:
    device = make_device(FALL)
    device.feed(rows_of("lll"))
    device.run_all()
    assert reconcile(device, [FALL]) == 0
    assert reconcile(device, rules) == 1
    assert reconcile(device, rules) == 0
    assert [state for _, state, *_ in states(device)] == ["raised", "cleared"]
    assert alerts(device)[-1].summary == f"tiny: fall is over: its rule {reason} in the config."
    assert device.store.open_alerts("tiny") == []


def test_a_changed_rule_starts_anew_under_the_next_number(make_device: Callable[..., Device]) -> None:
    device = make_device(FALL)
    device.feed(rows_of("lll"))
    device.run_all()
    device.alerts = [msgspec.structs.replace(FALL, for_="2 of 5")]
    device.restart()
    # Nothing reconciled: the next batch does.
    device.feed(rows_of("lrl"))
    device.run_all()
    assert [(identity, state, row) for identity, state, _, row in states(device)] == [
        ("tiny/fall/result/1", "raised", 3),
        ("tiny/fall/result/1", "cleared", None),
        ("tiny/fall/result/2", "raised", 6),
    ]


def test_a_rule_that_comes_back_does_not_use_an_id_again(make_device: Callable[..., Device]) -> None:
    device = make_device(FALL)
    device.feed(rows_of("lll"))
    device.run_all()
    reconcile(device, [])
    device.feed(rows_of("lll"))
    device.run_all()
    assert [identity for identity, state, *_ in states(device) if state == "raised"] == [
        "tiny/fall/result/1",
        "tiny/fall/result/2",
    ]


def test_a_lost_state_clears_the_open_alert_and_the_next_one_has_a_new_id(
    make_device: Callable[..., Device],
) -> None:
    device = make_device(FALL)
    device.feed(rows_of("lll"))
    device.run_all()
    with device.store.transaction() as tx:
        tx.delete_state("tiny", "alert rules")
    assert [reconcile(device, [FALL]) for _ in range(2)] == [1, 0]
    assert device.store.open_alerts("tiny") == []
    device.feed(rows_of("lll"))
    device.run_all()
    assert [(identity, state) for identity, state, *_ in states(device)] == [
        ("tiny/fall/result/1", "raised"),
        ("tiny/fall/result/1", "cleared"),
        ("tiny/fall/result/2", "raised"),
    ]


def test_states_that_cannot_be_read_start_anew(make_device: Callable[..., Device]) -> None:
    device = make_device(FALL)
    with device.store.transaction() as tx:
        tx.save_state("tiny", "alert rules", b"{\xff")
    assert rule_store.load(device.store, "tiny") == TaskRuleStates()


def test_a_rule_goes_on_when_another_bundle_runs(make_device: Callable[..., Device]) -> None:
    device = make_device(FALL)
    device.feed(rows_of("lll"))
    device.run_all()
    device.active = activated(FLOAT)
    device.restart()
    device.feed(rows_of("rrrrr"))
    device.run_all()
    assert [(identity, state, row) for identity, state, _, row in states(device)] == [
        ("tiny/fall/result/1", "raised", 3),
        ("tiny/fall/result/1", "cleared", 8),
    ]


# --- other outputs ---


def test_a_value_raises_and_clears_between_two_limits(make_device: Callable[..., Device]) -> None:
    device = make_device(recipe=REGRESS)
    device.feed(REGRESS.rows(60))
    device.run_all()
    values = [value for message in device.results() for value in message.columns.value or [] if value is not None]
    high, low = np.quantile(values, [0.9, 0.1])
    rule = AlertRuleConfig(name="hot", value=f"> {high:.4f}", clear=f"< {low:.4f}", summary="{value} is too much")
    watched = make_device(rule, recipe=REGRESS, name="watched")
    watched.feed(REGRESS.rows(60))
    watched.run_all()
    expected, is_open = [], False
    for row, value in enumerate(values, 1):
        if value > high if not is_open else value < low:
            is_open = not is_open
            expected.append((row, "raised" if is_open else "cleared"))
    assert len(expected) >= 2
    assert [(row, state) for _, state, _, row in states(watched)] == expected
    assert alerts(watched)[0].summary == f"{values[expected[0][0] - 1]:.4g} is too much"


def test_an_anomaly_model_raises_by_its_threshold_and_by_its_value(make_device: Callable[..., Device]) -> None:
    rules = AlertRuleConfig(name="odd", anomaly=True), AlertRuleConfig(name="far", value=">= 0.5", for_="2 of 2")
    device = make_device(*rules, recipe=ANOMALY)
    noise = np.random.default_rng(1).normal(0, 3, (40, 2)).astype(np.float32)
    device.feed(np.concatenate([ANOMALY.rows(200), noise, ANOMALY.rows(200)]))
    device.run_all()
    raised = {(identity.split("/")[1], state) for identity, state, *_ in states(device)}
    assert raised == {("odd", "raised"), ("odd", "cleared"), ("far", "raised"), ("far", "cleared")}


def test_a_multi_label_model_compares_the_probability_of_the_named_label(make_device: Callable[..., Device]) -> None:
    rules = AlertRuleConfig(name="w", label="warm"), AlertRuleConfig(name="p", label="warm", score="> 0.5")
    device = make_device(*rules, recipe=SEVERAL)
    device.feed(SEVERAL.rows(200))
    device.run_all()
    by_rule = {
        name: [(state, row) for identity, state, _, row in states(device) if f"/{name}/" in identity] for name in "wp"
    }
    # 0.5 is the bundle's threshold of this label.
    assert by_rule["w"] == by_rule["p"] != []


def test_a_summary_with_steering_characters_is_sent_as_it_is_and_with_braces(
    make_device: Callable[..., Device],
) -> None:
    rule = AlertRuleConfig(name="x", label="left", summary="{{\x1b[31m}} {label}")
    device = make_device(rule)
    device.feed(rows_of("l"))
    device.run_all()
    assert alerts(device)[0].summary == "{\x1b[31m} left"


# --- health ---


def test_results_with_too_much_missing_input_do_not_count_for_a_rule_about_healthy_ones(
    make_device: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_rules, "MAX_PENDING", 0)
    healthy = AlertRuleConfig(name="healthy", label="left", only_healthy=True)
    device = make_device(healthy, AlertRuleConfig(name="any", label="left"))
    rows = rows_of("l")
    rows[:, 1:] = np.nan
    device.feed(np.concatenate([rows, rows_of("-"), rows_of("l")]))
    device.run_all()
    first = [row for identity, state, _, row in states(device) if "/healthy/" in identity and state == "raised"]
    assert first == [3]


def _faulty_drift(device: Device) -> DriftState:
    state = device.drift.state
    number = state.faults.number.copy()
    number[0, 0] = 1
    return msgspec.structs.replace(state, faults=msgspec.structs.replace(state.faults, number=number))


def test_results_while_a_fault_alert_is_open_do_not_count(make_device: Callable[..., Device]) -> None:
    device = make_device(msgspec.structs.replace(FALL, only_healthy=True))
    device.drift.state = _faulty_drift(device)
    device.feed(rows_of("lllll"))
    device.run_all()
    assert states(device) == []


def _record_health(
    flags: dict[int, bool], advance: Callable[..., Any], rule: Any, state: Any, results: BatchResults
) -> Any:
    flags |= dict(zip(results.rows.tolist(), results.is_healthy.tolist(), strict=True))
    return advance(rule, state, results)


def test_results_of_a_drift_window_with_a_fault_do_not_count_however_rows_are_split(
    make_device: Callable[..., Device],
) -> None:
    flags_by_size: list[dict[int, bool]] = []
    for number, size in enumerate((40, 7, 250)):
        device = make_device(msgspec.structs.replace(FALL, only_healthy=True), name=f"h{number}")
        rows = CLASSIFY.rows(800)
        rows[500:700, 0] = 1.25
        flags: dict[int, bool] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batch_rules, "_advance", partial(_record_health, flags, batch_rules._advance))
            run_in_parts(device, rows, [size] * (len(rows) // size))
        flags_by_size.append(flags)
    assert flags_by_size[0] == flags_by_size[1] == flags_by_size[2]
    # A drift window has 20 model windows of a row each. The alert clears after three windows without the fault.
    assert [row for row, is_healthy in flags_by_size[0].items() if not is_healthy] == list(range(501, 761))


def test_a_result_counts_once_its_drift_window_is_judged_also_after_a_restart(
    make_device: Callable[..., Device],
) -> None:
    device = make_device(msgspec.structs.replace(FALL, only_healthy=True))
    # Rows that repeat would be a fault.
    rows = rows_of("lll" + "-r" * 8 + "-") + np.random.default_rng(2).normal(0, 0.2, (20, 4)).astype(np.float32)
    device.feed(rows[:17])
    device.run_all()
    device.restart()
    device.feed(rows[17:19])
    device.run_all()
    assert states(device) == []
    device.feed(rows[19:])
    device.run_all()
    assert [(state, row) for _, state, _, row in states(device)] == [("raised", 3), ("cleared", 8)]
    assert "seq" not in alerts(device)[0].evidence


def test_a_longer_drift_window_holds_back_no_more_results_than_the_limit(
    make_device: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_rules, "MAX_PENDING", 4)
    device = make_device(msgspec.structs.replace(FALL, only_healthy=True))
    device.feed(rows_of("lllr"))
    device.run_all()
    assert states(device) == []
    device.feed(rows_of("rrr"))
    device.run_all()
    assert [(state, row) for _, state, _, row in states(device)] == [("raised", 3)]


def test_results_of_another_bundle_do_not_wait(make_device: Callable[..., Device]) -> None:
    device = make_device(msgspec.structs.replace(FALL, only_healthy=True))
    device.feed(rows_of("lll"))
    device.run_all()
    waiting = rule_store.load(device.store, "tiny").pending
    unpacked = waiting.unpack(device.task.bundle.digest, ())
    assert unpacked is not None
    assert unpacked.rows.tolist() == [1, 2, 3]
    assert unpacked.labels == ["left"] * 3
    assert waiting.unpack("sha256:other", ()) is None
    assert msgspec.structs.replace(waiting, columns={"rows": b"1"}).unpack(waiting.bundle, ()) is None


@pytest.mark.parametrize("recipe", [SEVERAL, REGRESS], ids=["multi-label", "regression"])
def test_every_output_waits_and_comes_back(make_device: Callable[..., Device], recipe: Recipe) -> None:
    condition = {"label": "warm"} if recipe is SEVERAL else {"value": "> 0"}
    rule = AlertRuleConfig(name="x", **condition)  # type: ignore[arg-type]
    at_once = make_device(rule, recipe=recipe, name="at-once")
    waiting = make_device(msgspec.structs.replace(rule, only_healthy=True), recipe=recipe, name="waiting")
    for device, sizes in ((at_once, [60]), (waiting, [7] * 9)):
        run_in_parts(device, recipe.rows(60), sizes)
    assert states(at_once)
    assert sorted(states(waiting)) == sorted(states(at_once))


def test_a_device_without_rules_stores_no_state_of_them(make_device: Callable[..., Device]) -> None:
    device = make_device()
    device.feed(rows_of("lll"))
    device.run_all()
    assert device.store.tasks_with_state("alert rules") == []


def test_alerts_of_a_rule_that_fires_all_the_time_stay_within_the_transaction(
    make_device: Callable[..., Device],
) -> None:
    device = make_device(AlertRuleConfig(name="x", label="left"), AlertRuleConfig(name="y", label="right"))
    limit = device.task.size.max_rows(1 << 20)
    assert limit < make_device(name="plain").task.size.max_rows(1 << 20)
    device.feed(rows_of("l-r-" * 100))
    device.run_all()
    assert len(alerts(device)) == 400
