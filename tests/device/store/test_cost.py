"""What work costs is counted once, with the work; other settings are reckoned with from what was counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from agent import clock, config
from agent.cli import cli
from agent.device.pipeline import batch, what_if
from agent.device.recovery.open import open_store
from agent.device.store import cost
from agent.device.store.cost import ProcessCost, ProcessMeter, TaskCost
from agent.device.store.store import Store
from agent.errors import StorageFull, UsageError
from tests.end_to_end.test_daemon import Turned
from tests.kit.stations import T0


def task(**more: int) -> TaskCost:
    known = {"batches": 10, "windows": 1000, "rows": 100_000, "listed": 1000, "cpu_us": 200_000}
    squares = {"windows_squared": 100_000, "windows_times_cpu": 20_000_000}
    sizes = {"results": 10 * what_if.ENVELOPE_BYTES + 30_000, "drift": 20_000}
    return TaskCost(**{**known, **squares, **more}, messages_by_kind={"results": 10, "drift": 5}, bytes_by_kind=sizes)


@given(st.floats(0, 5000), st.floats(0, 500), st.lists(st.integers(1, 4096), min_size=2, max_size=40))
def test_what_a_batch_costs_by_itself_and_with_each_window_is_found_again(
    fixed: float, each: float, sizes: list[int]
) -> None:
    costs = [round(fixed + each * n) for n in sizes]
    made = task(
        batches=len(sizes),
        windows=sum(sizes),
        cpu_us=sum(costs),
        windows_squared=sum(n * n for n in sizes),
        windows_times_cpu=sum(n * c for n, c in zip(sizes, costs, strict=True)),
    )
    alone, window = made.batch_and_window_us
    assert alone >= 0
    assert window >= 0
    assert len(sizes) * alone + sum(sizes) * window == pytest.approx(sum(costs), rel=0.01, abs=len(sizes))
    if len(set(sizes)) > 1 and made.windows_squared - made.windows**2 / len(sizes) > 0.02 * made.windows_squared:
        assert alone == pytest.approx(fixed, abs=2 + 0.02 * fixed + 0.02 * each * max(sizes))


@pytest.fixture
def turned(tmp_path: Path) -> Iterator[Turned]:
    made = Turned(tmp_path)
    yield made
    made.store.close()


def costs(store: Store, name: str = "exercise") -> TaskCost:
    return cost.read_task_cost(store.counters(), name)


def test_batches_are_counted_with_the_next_commit_each_once(turned: Turned) -> None:
    with turned.store.transaction() as tx:
        assert tx.counter("windows.exercise") == 0
    for rows in (1000, 500, 700):
        turned.feed(rows)
        turned.turn(after_s=60.0)
    found = costs(turned.store)
    assert (found.batches, found.windows, found.rows, found.listed) == (2, 15, 1500, 15)
    assert found.cpu_us > 0
    assert found.messages_by_kind["results"] == 3
    sent = [m for m in turned.store.unacknowledged_messages(0, 1000) if m.topic.endswith("results/exercise")]
    bytes_of = sum(len(m.payload) + len(m.jws) + len(m.topic) for m in sent)
    assert bytes_of < found.bytes_by_kind["results"] < bytes_of + len(sent) * 500


def test_a_batch_that_a_full_store_refused_is_not_counted(turned: Turned, monkeypatch: pytest.MonkeyPatch) -> None:
    turned.feed(1000)
    turned.turn(after_s=60.0)
    turned.feed(1000)
    real = batch._build_result_bodies
    monkeypatch.setattr(batch, "_build_result_bodies", lambda *_: (_ for _ in ()).throw(StorageFull("full")))
    turned.turn(after_s=60.0)
    assert costs(turned.store).batches == 0
    monkeypatch.setattr(batch, "_build_result_bodies", real)
    turned.turn(after_s=60.0)
    turned.feed(100)
    turned.turn(after_s=60.0)
    assert costs(turned.store).windows == 20


def test_energy_is_counted_where_it_can_be_read_and_a_counter_that_wraps_says_nothing(tmp_path: Path) -> None:
    store, package = open_store(tmp_path / "data"), tmp_path / "class/powercap/intel-rapl:0/energy_uj"
    package.parent.mkdir(parents=True)
    meter = ProcessMeter(tmp_path)
    for second, energy in enumerate(("1000000", "3000000", "500000", "none", "2500000", "4500000")):
        package.write_text(energy)
        with store.transaction() as tx:
            meter.tick(tx, clock.ClockReading(round(T0 * 1e6), 1000.0 + second, "synced"))
    counters = store.counters()
    assert counters["cost.process.ms"] == 5000
    assert (counters["cost.process.energy_uj"], counters["cost.process.energy_ms"]) == (4_000_000, 2000)
    assert cost.read_process_cost(counters).energy_j == pytest.approx(10.0)
    store.close()


def test_of_the_machines_energy_the_agent_has_its_share_of_the_busy_time() -> None:
    assert ProcessCost(60, 2.0, 0, 8.0, 0, 100.0).own_energy_j == 25.0
    assert ProcessCost(60, 2.0, 0, 0.0, 0, 100.0).own_energy_j is None
    assert ProcessCost(60, 2.0, 0, 8.0, 0, None).own_energy_j is None


def test_fewer_runs_save_what_a_batch_costs_by_itself_and_nothing_else() -> None:
    made = task(
        batches=10, windows=1000, cpu_us=10 * 5000 + 1000 * 100, windows_squared=150_000, windows_times_cpu=20_000_000
    )
    now = what_if.compute_current_cost(made, 100.0)
    then = what_if.project_cost(made, 100.0, what_if.parse_scenario("f", {"schedule": "every 100 s"}), [], "all")
    assert (then.batches, then.windows, then.listed_results) == (864.0, now.windows, now.listed_results)
    assert now.batches == 8640.0
    assert then.sent_bytes == pytest.approx(now.sent_bytes - (now.batches - then.batches) * what_if.ENVELOPE_BYTES)
    assert then.cpu_s < now.cpu_s


def test_a_summary_lists_nothing_and_drift_is_told_all_the_same() -> None:
    then = what_if.project_cost(task(), 100.0, what_if.parse_scenario("f", {"publish": "summary"}), [], "all")
    assert then.listed_results == 0
    assert then.sent_bytes == pytest.approx((20_000 + 10 * what_if.ENVELOPE_BYTES) * 864)


def test_no_run_finds_less_than_one_window_to_do() -> None:
    then = what_if.project_cost(
        task(windows=5), 100.0, what_if.parse_scenario("f", {"schedule": "every 1 s"}), [], "all"
    )
    assert then.batches == then.windows


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"schedul": "every 5 s"}, "schedul: what can be otherwise is schedule, batch, publish"),
        ({"schedule": "0 3 * * *"}, "only intervals"),
        ({"schedule": "every 0 s"}, "an interval must be longer than nothing"),
        ({"batch": "0"}, "give the model windows"),
        ({"batch": "-3"}, "give the model windows"),
        ({"publish": "some"}, "give all, changes, summary"),
    ],
)
def test_a_wish_that_cannot_be_reckoned_with_is_named(wish: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        what_if.parse_scenario("f", wish)


def test_publish_below_is_read_as_the_config_has_it() -> None:
    assert what_if.parse_scenario("f", {"publish": "below = 0.6"}).publish == config.PublishBelow(below=0.6)


def test_the_command_tells_costs_by_task_and_what_other_settings_would_cost(turned: Turned) -> None:
    for _ in range(4):
        turned.feed(3000)
        turned.turn(after_s=60.0)
    turned.store.close()
    asked = ["cost", "exercise", "-c", str(turned.file), "--what-if", "publish=changes"]
    told = json.loads(CliRunner().invoke(cli, [*asked, "--json"]).output)
    (one,) = told["tasks"]
    assert (one["inferences"], one["rows"]) == (90, 9000)
    assert one["per_1000"]["air_bytes"] == pytest.approx(one["air_bytes"] / 90 * 1000, abs=1)
    assert one["raw"]["bytes"] > 9000 * 32
    assert one["what_if"]["then"]["listed"] < one["what_if"]["now"]["listed"]
    assert one["what_if"]["then"]["air_bytes"] < one["what_if"]["now"]["air_bytes"]
    shown = CliRunner().invoke(cli, asked)
    assert shown.exit_code == 0
    assert "exercise, a day" in shown.output
    assert "on the air" in shown.output
    status = json.loads(CliRunner().invoke(cli, ["status", "--json", "-c", str(turned.file)]).output)
    assert status["store"]["written_per_day"] == told["per_day"]["flash_bytes"] >= 0
    assert "MB a day written" in CliRunner().invoke(cli, ["status", "-c", str(turned.file)]).output


def test_before_anything_is_counted_the_command_says_so_and_of_an_unknown_task_its_name(tmp_path: Path) -> None:
    made = Turned(tmp_path)
    made.store.close()
    shown = CliRunner().invoke(cli, ["cost", "-c", str(made.file)])
    assert (shown.exit_code, shown.output) == (0, "Nothing is counted yet: the daemon counts once a minute.\n")
    wrong = CliRunner().invoke(cli, ["cost", "exercse", "-c", str(made.file)])
    assert isinstance(wrong.exception, UsageError)
    assert "did you mean 'exercise'" in str(wrong.exception)
