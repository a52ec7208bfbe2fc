"""Alert rules for Prometheus: each fires, none on a healthy fleet, and each names metrics that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from outstation.fleet.metrics import collector_families, device_families

ROOT = Path(__file__).parents[3]
RULES = ROOT / "deploy" / "prometheus-rules.yml"
_METRIC = re.compile(r"outstation_[a-z_]+")


def test_promtool_passes_the_rules(tmp_path: Path) -> None:
    text = (Path(__file__).parent / "rules_test.yml").read_text()
    (tmp_path / "test.yml").write_text(text.replace("RULES", str(RULES)))
    done = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_rule_that_never_fires_fails_the_check(tmp_path: Path) -> None:
    rules = RULES.read_text().replace("outstation_device_storage_left_seconds < 86400", "outstation_no_metric < 1")
    (tmp_path / "rules.yml").write_text(rules)
    text = (Path(__file__).parent / "rules_test.yml").read_text()
    (tmp_path / "test.yml").write_text(text.replace("RULES", "rules.yml"))
    assert subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True).returncode == 1


def test_the_rules_name_metrics_that_are_exported() -> None:
    code = "".join(Path(str(module.__file__)).read_text() for module in (device_families, collector_families))
    expressions = [line for line in RULES.read_text().splitlines() if line.strip().startswith("expr:")]
    for metric in {name for line in expressions for name in _METRIC.findall(line)}:
        parts = metric.removesuffix("_total").split("_", 2)
        assert f'"{parts[2]}' in code or f'"{metric.removesuffix("_total")}"' in code, metric
