"""A metered connection in `status`, `check` and `metrics`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from outstation.device.uplink.meter import TrafficMeter
from outstation.foundation.clock import ClockReading
from outstation.foundation.config.quantities import Size
from outstation.protocol.transport.broker_config import MeteredConfig
from tests.device.pipeline.test_relearn import Site, work
from tests.kit.commands import call_outstation

SECTION = '\n[broker.metered]\nbudget = "500 kB"\nmax_age = "7 d"\n'


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    made = Site(tmp_path_factory.mktemp("metered"))
    with made.open() as store:
        work(made, store, 3)
        # `status` reads the boot-time clock of this machine, which may have been on for weeks.
        now = ClockReading(1_795_000_000_000_000, time.clock_gettime(time.CLOCK_BOOTTIME), "synced")
        TrafficMeter(MeteredConfig(budget=Size(500_000)), store, now).observe(420_000, now)
    made.file.write_text(made.file.read_text() + SECTION)
    return made


def test_status_shows_what_was_used_and_what_holds_bulk_back(site: Site) -> None:
    text = " ".join(call_outstation("status", "-c", str(site.file)).stdout.split())
    assert "0.42 MB of 0.50 MB used within 24 h; bulk waits for the budget; given up after 168 h: 0 messages" in text
    metered = json.loads(call_outstation("status", "--json", "-c", str(site.file)).stdout)["metered"]
    assert (metered["budget"], metered["bulk"], metered["expired"]) == (500_000, "waits for the budget", 0)
    assert metered["used"] >= 420_000


def test_metrics_have_the_same_numbers(site: Site) -> None:
    text = call_outstation("metrics", "-c", str(site.file)).stdout
    assert "outstation_device_metered_limit_bytes" in text
    assert "outstation_device_expired_messages_total" in text


@pytest.mark.process
@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (SECTION, lambda line: line["state"] == "ok" and "used within 24 h" in line["detail"]),
        ("", lambda line: line is None),
    ],
)
def test_check_explains_the_limits(site: Site, tmp_path: Path, section: str, expected: Callable[..., bool]) -> None:
    file = site.file.with_name("checked.toml")
    file.write_text(site.file.read_text().replace(SECTION, section))
    lines = json.loads(call_outstation("check", "--json", "-c", str(file)).stdout)
    assert expected(next((line for line in lines if line["name"] == "metered"), None))
