"""Class field: a category field stands for the classes of a model without any, from the config to drift tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from outstation.device import config
from outstation.device.bootstrap import tasks
from outstation.device.config.config import Config
from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.pipeline import batch
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.recovery.open import open_store
from outstation.device.store.message_log import MessageLog
from outstation.device.store.rows import Rows
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import ConfigError
from outstation.workbench.testing.messages import new_key
from scripts.kit.bundles import CLASSIFY, KEY, REGRESS, Recipe, packed

NOW = ClockReading(1_764_022_680_000_000, 100.0, "synced")


def conf(folder: Path, recipe: Recipe, mode: str | None) -> Config:
    fields = [
        *(FieldConfig(name=name) for name in recipe.fields),
        FieldConfig(name="state", type="category", optional=True),
    ]
    return Config(
        device=config.DeviceConfig(id="pi-07", fleet="acme", data_dir=str(folder)),
        publishers=config.PublishersConfig(keys=[KEY.public.text]),
        streams={"machine": StreamConfig(fields=fields)},
        tasks={"tiny": config.TaskConfig(stream="machine", bundle="tiny", learn_windows=20, class_field=mode)},
    )


def loaded(folder: Path, recipe: Recipe, mode: str | None, store: Store | None = None) -> LoadedTask:
    path = folder / "bundle" if (folder / "bundle").exists() else packed(folder, recipe)
    return tasks.load_task(folder / "outstation.toml", conf(folder, recipe, mode), store, "tiny", path)


def asking(mode: str) -> Recipe:
    """A regression whose bundle names a field of modes."""
    return replace(REGRESS, mode=mode)


def test_readings_are_compared_within_the_modes_that_the_field_names(tmp_path: Path) -> None:
    with open_store(tmp_path / "data") as store:
        store.declare_streams(conf(tmp_path, REGRESS, "state").streams)
        task = loaded(tmp_path, REGRESS, "state", store)
        values = REGRESS.rows(600)
        with store.transaction() as tx:
            codes = tx.assign_category_codes("machine", "state", ["idle", "run"], limit=1000, last_row=0)[0]
            named = np.array([0, *codes], "<u2")[np.arange(600) // 10 % 3]
            t = NOW.wall_us + np.arange(600, dtype=np.int64) * 10_000
            tx.append("machine", Rows(t, (*(np.ascontiguousarray(c) for c in values.T), named)), "synced")
        author = MessageLog("acme", "pi-07", new_key(1), store.log_id, 1, 120_000)
        while batch.run(task, store, author, NOW) is not None:
            pass
        assert task.drift is not None
        assert task.drift.state.known_modes == ("idle", "run")
        assert task.drift.state.site_reference is not None
        assert task.drift.state.site_reference.class_n[[0, 1, 32, 2], 0].tolist() == [130, 130, 140, 0]
        again = loaded(tmp_path, REGRESS, "state", store)
        assert again.drift is not None
        assert again.drift.state.to_bytes() == task.drift.state.to_bytes()


def test_a_task_may_override_the_class_field_of_its_bundle(tmp_path: Path) -> None:
    for override, mode, expected in (("state", None, "state"), ("state", "", ""), ("other", "state", "state")):
        folder = tmp_path / f"{override} {mode}"
        folder.mkdir()
        task = loaded(folder, asking(override), mode)
        assert task.drift is not None
        assert task.drift.monitor.settings.class_field == expected


def test_a_field_of_modes_that_a_stream_has_not_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        loaded(tmp_path, asking("stat"), None)
    for words in ("tasks.tiny.class_field", 'class_field = "" for none', "did you mean 'state'"):
        assert words in str(refused.value)


def test_a_task_of_a_classifier_has_no_class_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names classes itself, so `class_field` has no use: remove it"):
        loaded(tmp_path, CLASSIFY, "state")
