"""Cost: work is counted once, in the commit of the work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from outstation.device.recovery.open import open_store
from outstation.device.store import cost
from outstation.device.store.cost import ProcessCost, ProcessMeter, TaskCost
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.foundation.cli.commands import cli
from outstation.foundation.errors import StorageFull, UsageError
from tests.end_to_end.test_daemon import Turned
from tests.kit.stations import T0


@pytest.fixture
def turned(disk_path: Path) -> Iterator[Turned]:
    made = Turned(disk_path)
    yield made
    made.store.close()


def costs(store: Store, name: str = "exercise") -> TaskCost:
    return cost.read_task_cost(store.counters(), name)


def test_each_batch_is_counted_once_with_its_own_commit(turned: Turned) -> None:
    with turned.store.transaction() as tx:
        assert tx.counter("windows.exercise") == 0
    for rows in (1000, 500, 700):
        turned.feed(rows)
        turned.turn(after_s=60.0)
    result = costs(turned.store)
    assert (result.batches, result.windows, result.rows) == (3, 22, 2200)
    assert result.cpu_us > 0
    assert result.messages_by_kind["results"] == 3
    sent = [m for m in turned.store.unacknowledged_messages(0, 1000) if m.topic.endswith("results/exercise")]
    bytes_of = sum(len(m.payload) + len(m.jws) + len(m.topic) for m in sent)
    assert bytes_of < result.bytes_by_kind["results"] < bytes_of + len(sent) * 500


def test_a_batch_that_a_full_store_refused_is_not_counted(
    turned: Turned, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    turned.feed(1000)
    turned.turn(after_s=60.0)
    turned.feed(1000)
    real = MessageLog.append_all
    monkeypatch.setattr(MessageLog, "append_all", lambda *_: (_ for _ in ()).throw(StorageFull("full")))
    turned.turn(after_s=60.0)
    assert costs(turned.store).batches == 1
    monkeypatch.setattr(MessageLog, "append_all", real)
    turned.turn(after_s=60.0)
    assert costs(turned.store).windows == 20
    # The log's records hold the error, and with it the batch and its model.
    caplog.clear()


def test_a_wrapped_or_unreadable_energy_counter_counts_nothing(tmp_path: Path) -> None:
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


def test_the_command_shows_costs_by_task(turned: Turned) -> None:
    for _ in range(4):
        turned.feed(3000)
        turned.turn(after_s=200.0)
    turned.store.close()
    requested = ["cost", "exercise", "-c", str(turned.file)]
    reported = json.loads(CliRunner().invoke(cli, [*requested, "--json"]).output)
    (item,) = reported["tasks"]
    assert (item["inferences"], item["rows"]) == (120, 12_000)
    assert item["per_1000"]["air_bytes"] == pytest.approx(item["air_bytes"] / 120 * 1000, abs=1)
    assert item["raw"]["bytes"] > 12_000 * 32
    assert reported["month"]["inferences"] > 90
    assert reported["month"]["raw_bytes"] > reported["month"]["air_bytes"] > 0
    assert reported["month"]["break_even"] == 1
    plot = turned.file.with_name("cost.svg")
    shown = CliRunner().invoke(cli, [*requested, "--devices", "100", "--plot", str(plot)])
    assert shown.exit_code == 0
    assert "on the air" in shown.output
    assert "Not counted, as the price list has no price: energy, air, flash, the collector." in shown.output
    assert "cheaper for a fleet of any size" in shown.output
    assert "<svg" in plot.read_text(encoding="utf-8")
    status = json.loads(CliRunner().invoke(cli, ["status", "--json", "-c", str(turned.file)]).output)
    assert status["store"]["written_per_day"] == reported["per_day"]["flash_bytes"] > 0
    assert "MB written a day" in CliRunner().invoke(cli, ["status", "-c", str(turned.file)]).output


def test_batches_since_time_was_last_counted_do_not_raise_the_month(turned: Turned) -> None:
    def report() -> tuple[int, dict[str, float], dict[str, float]]:
        reported = json.loads(CliRunner().invoke(cli, ["cost", "--json", "-c", str(turned.file)]).output)
        return reported["tasks"][0]["inferences"], reported["month"], reported["per_day"]

    for _ in range(2):
        turned.feed(3000)
        turned.turn(after_s=200.0)
    turned.turn(after_s=61.0)
    inferences, *scaled = report()
    assert inferences == 60
    turned.feed(3000)
    turned.turn(after_s=59.0)
    assert report() == (90, *scaled)


def test_batches_without_the_daemon_are_counted_and_what_only_the_daemon_counts_is_missing(turned: Turned) -> None:
    turned.feed(3000)
    turned.store.close()
    command = ["-c", str(turned.file)]
    assert CliRunner().invoke(cli, ["batch", *command]).exit_code == 0
    reported = json.loads(CliRunner().invoke(cli, ["cost", "--json", *command]).output)
    item = next(task for task in reported["tasks"] if task["task"] == "exercise")
    assert (item["batches"], item["inferences"]) == (1, 30)
    assert item["per_1000"]["cpu_s"] > 0 < item["air_bytes"] <= reported["air_bytes"]
    assert [reported[name] for name in ("cpu_s", "flash_bytes", "month")] == [None, None, None]
    assert item["flash_bytes"] is item["per_1000"]["flash_bytes"] is None
    shown = CliRunner().invoke(cli, ["cost", *command]).output
    assert "batches only; the daemon counts the whole process" in shown
    assert next(line.split()[:2] for line in shown.splitlines() if line.startswith("exercise ")) == ["exercise", "30"]


def test_the_cost_command_without_counters_or_with_an_unknown_task(tmp_path: Path) -> None:
    made = Turned(tmp_path)
    made.store.close()
    shown = CliRunner().invoke(cli, ["cost", "-c", str(made.file)])
    assert (shown.exit_code, shown.output) == (
        0,
        "Nothing is counted yet: batches count themselves, and the daemon counts the rest once a minute.\n",
    )
    wrong = CliRunner().invoke(cli, ["cost", "exercse", "-c", str(made.file)])
    assert isinstance(wrong.exception, UsageError)
    assert "did you mean 'exercise'" in str(wrong.exception)
