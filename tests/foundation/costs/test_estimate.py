"""Cost estimates: a month in money, the break-even of a fleet, and price lists."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.foundation.costs.estimate import Comparison, MonthlyCost, compare
from outstation.foundation.costs.prices import EdgePrices, PriceList, load_prices, shipped_text
from outstation.foundation.costs.usage import MONTH_S, Usage, average_usage
from outstation.foundation.errors import ConfigError
from outstation.foundation.render.charts import render_cost_chart
from outstation.foundation.render.theme import DARK_THEME

MONTH = Usage(seconds=MONTH_S, cpu_s=100, flash_bytes=2e12, air_bytes=1e9, raw_bytes=10 * 5120e6, inferences=1e6,
              energy_j=7.2e6)  # fmt: skip
PRICES = load_prices(None)
OWN = msgspec.structs.replace(
    PRICES, edge=EdgePrices(energy_per_kwh=0.5, air_per_gb=2.0, flash_per_tb=3.0, collector_per_month=100.0)
)


def test_a_month_in_money_counts_each_part() -> None:
    result = compare(MONTH, OWN)
    assert result.edge.per_device == {"energy": 1.0, "air": 2.0, "flash": 6.0}
    assert result.edge.total(10) == pytest.approx(100 + 90)
    # Ten million messages of 5 KB, and 51.2 GB through the same radio.
    assert result.cloud.per_device == {"air": pytest.approx(102.4), "messages": pytest.approx(10.0)}
    assert result.cloud.fixed == pytest.approx(0.05 * 730.5)
    assert result.break_even == 1


def test_a_day_is_scaled_to_a_month() -> None:
    day = Usage(seconds=86_400, cpu_s=1, flash_bytes=2, air_bytes=3, raw_bytes=4, inferences=5)
    month = day.per_month()
    assert month.cpu_s == pytest.approx(30.4375)
    assert month.inferences == pytest.approx(5 * 30.4375)
    assert month.energy_j is None
    with pytest.raises(ValueError, match="nothing is counted"):
        msgspec.structs.replace(day, seconds=0).per_month()


def test_energy_of_a_fleet_is_unknown_where_one_device_does_not_measure_it() -> None:
    silent = msgspec.structs.replace(MONTH, energy_j=None, air_bytes=3e9)
    mean = average_usage([MONTH, silent])
    assert (mean.energy_j, mean.air_bytes) == (None, 2e9)
    with pytest.raises(ValueError, match="no device has reported"):
        average_usage([])


money = st.floats(0, 1e6)


@given(money, money, money, money)
def test_from_the_break_even_on_devices_cost_no_more(fixed: float, each: float, endpoint: float, raw: float) -> None:
    prices = PriceList(
        edge=EdgePrices(collector_per_month=fixed, air_per_gb=1.0),
        cloud=msgspec.structs.replace(PRICES.cloud, endpoint_per_hour=endpoint / 730.5, messages_per_million=0.0),
    )
    result = compare(msgspec.structs.replace(MONTH, air_bytes=each * 1e9, raw_bytes=raw * 1e9), prices)
    count, slack = result.break_even, 1e-6 * (fixed + endpoint + each + raw + 1)
    if (most := result.cheaper_until) is not None:
        assert result.edge.total(most) <= result.cloud.total(most) + slack * most
        assert result.edge.total(most + 1) >= result.cloud.total(most + 1) - slack * (most + 1)
    if count is None:
        assert result.edge.total(1e9) >= result.cloud.total(1e9) - slack * 1e9
        return
    assert result.edge.total(count) <= result.cloud.total(count) + slack * count
    assert result.edge.total(10 * count) <= result.cloud.total(10 * count) + slack * count * 10
    if count > 1:
        assert result.edge.total(count - 1) >= result.cloud.total(count - 1) - slack * count


def test_the_shipped_prices_name_their_date_and_sources_and_none_of_your_contracts() -> None:
    assert PRICES.cloud.as_of.year >= 2026
    assert all(source.startswith("https://") for source in PRICES.cloud.sources)
    assert PRICES.edge == EdgePrices()


def test_a_copy_of_the_price_list_is_read_and_a_wrong_one_names_its_key(tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    with pytest.raises(ConfigError, match="--show-prices"):
        load_prices(file)
    file.write_text(shipped_text().replace("air_per_gb = 0.0", "air_per_gb = 4.5"), encoding="utf-8")
    assert load_prices(file).edge.air_per_gb == 4.5
    file.write_text(shipped_text().replace("air_per_gb = 0.0", "air_per_gb = -1.0"), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_prices(file)
    assert caught.value.key == "edge.air_per_gb"


@pytest.mark.parametrize("most", [2, 10_000])
def test_the_chart_stays_on_its_paper_for_costs_of_any_size(most: int) -> None:
    for fixed, each in ((0.0, 0.0), (0.0, 1e-9), (1e9, 1e9)):
        comparison = Comparison(MonthlyCost(fixed, {"air": each}), MonthlyCost(36.5, {"air": 0.2}), 7)
        svg = render_cost_chart(comparison, "EUR", "a cloud & more", most, DARK_THEME)
        ys = [float(y) for y in re.findall(r'y="([-\d.]+)"', svg)]
        assert all(0 <= y <= 400 for y in ys)
        assert "a cloud &amp; more" in svg


def test_a_date_that_is_none_is_named_with_an_example(tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(re.sub("as_of = .*", 'as_of = "soon"', shipped_text()))
    with pytest.raises(ConfigError, match=r"cloud\.as_of: must be a date, such as 2026-12-01"):
        load_prices(file)
