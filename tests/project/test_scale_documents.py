"""Resources of a fleet: the page shows what the command computes from the committed measurements."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from scripts import scale_documents
from scripts.scale_documents import HEALTH, RESULT, RESULTS, Fleet


@pytest.fixture(scope="module")
def section() -> str:
    text = (scale_documents.ROOT / scale_documents.PAGE).read_text(encoding="utf-8")
    return text.partition(f"\n## {scale_documents.TITLE}\n")[2].partition("\n## ")[0].strip()


def test_the_page_shows_the_committed_measurements_and_what_follows_from_them(section: str) -> None:
    assert section == scale_documents.render(scale_documents.read()), "run python -m scripts.scale_documents"


def test_nothing_was_lost_or_doubled_with_one_to_eight_collectors_and_a_killed_leader() -> None:
    measured = scale_documents.read()
    assert [c.collectors for c in measured.costs if c.database == "PostgreSQL" and c.message == RESULTS] == [1, 2, 4, 8]
    assert {c.message for c in measured.costs if c.database == "SQLite"} == {RESULTS, RESULT, HEALTH}
    assert 0 < measured.killed.waiting < measured.killed.messages
    assert (measured.killed.lost, measured.killed.doubled) == (0, 0)


@pytest.mark.parametrize("column", range(3))
def test_the_command_prints_the_columns_of_the_page(section: str, column: int) -> None:
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    page = {row[0]: row[1 + column] for row in rows if len(row) == 4}
    devices = str(scale_documents.SIZES[column])
    printed = CliRunner().invoke(scale_documents.main, ["--devices", devices]).stdout.splitlines()
    shown = {line[:45].strip(): line[45:].strip() for line in printed}
    assert len(shown) >= 10
    assert shown == {name: page[name] for name in shown}


@given(st.integers(1, 10**6), st.integers(2, 50), st.sampled_from([RESULTS, RESULT]))
def test_resources_grow_with_devices_and_fall_with_the_interval(devices: int, factor: int, message: str) -> None:
    measured = scale_documents.read()
    base = scale_documents.compute(measured, Fleet(devices, message))
    larger = scale_documents.compute(measured, Fleet(devices * factor, message))
    assert larger.messages == pytest.approx(factor * base.messages)
    assert larger.broker_bytes == pytest.approx(factor * base.broker_bytes)
    assert larger.collectors >= base.collectors
    if larger.database == base.database:
        assert larger.collector_cores == pytest.approx(factor * base.collector_cores)
        assert larger.growth_bytes == pytest.approx(factor * base.growth_bytes)
    # As many messages of more devices are as much work.
    assert scale_documents.compute(measured, Fleet(devices * factor, message, 60.0 * factor)) == pytest.approx(base)


@given(st.integers(1, 200_000), st.sampled_from([RESULTS, RESULT]))
def test_sqlite_is_proposed_where_its_one_collector_works_off_an_hour_within_two(devices: int, message: str) -> None:
    need = scale_documents.compute(scale_documents.read(), Fleet(devices, message))
    assert need.database == "PostgreSQL" or (need.catch_up_s is not None and need.catch_up_s <= 7200)


def test_a_collector_without_spare_capacity_never_works_off_an_outage() -> None:
    measured = scale_documents.read()
    rates = [scale_documents.compute(measured, Fleet(devices)) for devices in (1, 10**9)]
    assert [need.catch_up_s is None for need in rates] == [False, True]
    assert rates[0].catch_up_s == pytest.approx(3600 * rates[0].messages / (rates[0].capacity - rates[0].messages))
