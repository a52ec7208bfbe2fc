"""Alert rules and roll-outs: a bundle for which a rule can never fire does not fit the device."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from outstation.device import config
from outstation.device.bootstrap import tasks
from outstation.foundation.errors import ConfigError
from outstation.ml.model.bundle.bundle import Bundle
from scripts.kit.bundles import CLASSIFY, activated

CONFIG = """
[device]
id = "pi-07"
fleet = "acme"

[streams.watch]
fields = [{{ name = "a" }}, {{ name = "b" }}, {{ name = "c" }}, {{ name = "d" }}]

[tasks.tiny]
stream = "watch"
bundle = "tiny"

[[tasks.tiny.alerts]]
name = "fall"
{rule}
"""


def check(folder: Path, rule: str, bundle: Bundle) -> None:
    file = folder / "outstation.toml"
    file.write_text(CONFIG.format(rule=rule), encoding="utf-8")
    tasks.check_fields(file, config.load(file), "tiny", bundle)


def test_a_bundle_without_the_class_of_a_rule_does_not_fit(tmp_path: Path) -> None:
    bundle = activated(CLASSIFY).bundle
    check(tmp_path, 'label = "left"', bundle)
    output = msgspec.structs.replace(bundle.manifest.output, labels=["up", "down", "rest"])
    other = msgspec.structs.replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, output=output))
    with pytest.raises(ConfigError, match=r"tasks.tiny.alerts\[0\].label: bundle tiny has no class 'left'"):
        check(tmp_path, 'label = "left"', other)


def test_the_config_is_refused_before_any_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can never be reached"):
        check(tmp_path, 'label = "left"\nfor = "6 of 5"', activated(CLASSIFY).bundle)
