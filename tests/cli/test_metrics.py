"""Command `outstation metrics`: its text, and the file that it replaces as a whole."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.device.pipeline.test_relearn import Site, work
from tests.kit.commands import call_outstation


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    made = Site(tmp_path_factory.mktemp("metrics"))
    with made.open() as store:
        work(made, store, 3)
    return made


def test_the_text_passes_promtool_and_has_the_numbers_of_status(site: Site) -> None:
    text = call_outstation("metrics", "--config", str(site.file)).stdout
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    samples = {s.name: s for family in text_string_to_metric_families(text) for s in family.samples}
    assert samples["outstation_task_consumed_rows_total"].labels["task"] == "exercise"
    assert samples["outstation_task_consumed_rows_total"].value > 0
    assert samples["outstation_stream_accepted_rows_total"].value > 0
    assert 0 < samples["outstation_task_windows_total"].value < samples["outstation_task_consumed_rows_total"].value
    assert samples["outstation_device_storage_used_bytes"].labels["device"] == site.conf.device.id


def test_the_file_is_replaced_as_a_whole(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "outstation.prom"
    file.write_text("old")
    before = os.stat(file).st_ino
    call_outstation("metrics", "--config", str(site.file), "--out", str(file))
    assert file.read_text().startswith("# HELP outstation_device_")
    assert os.stat(file).st_ino != before
    assert os.listdir(tmp_path) == ["outstation.prom"]
    assert file.stat().st_mode & 0o777 == 0o644
