"""Task plan: a task with its bundle and model, and the shape of its windows; nothing in it changes while it runs."""

from __future__ import annotations

from typing import Any, Self

import msgspec

from outstation.device.config import StreamConfig, TaskConfig
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference import features
from outstation.ml.model.inference.inference import Inference, RunnableModel
from outstation.ml.model.inference.tuning import Tuning


class TaskPlan(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """A task, its stream, and its loaded bundle. `input_columns`: place of each input field in the stream's fields.

    `keep_results`: predictions are stored for labels; `tuning`: as measured for `model`, or None.
    """

    name: str
    config: TaskConfig
    stream: StreamConfig
    bundle: Bundle
    model: RunnableModel
    inference: Inference
    input_columns: list[int]
    config_digest: str
    keep_results: bool = True
    tuning: Tuning | None = None

    @classmethod
    def from_bundle(
        cls,
        name: str,
        config: TaskConfig,
        stream: StreamConfig,
        bundle: Bundle,
        model: RunnableModel,
        config_digest: str,
        *,
        keep_results: bool = True,
        tuning: Tuning | None = None,
    ) -> Self:
        """Plan task `name` with this `bundle`, whose model is loaded as `model`."""
        manifest, names = bundle.manifest, [f.name for f in stream.fields]
        columns = [names.index(field) for field in manifest.input.fields]
        if stream.media_format is not None:
            manifest = features.limit_gap(manifest, stream.media_format.max_row_gap_s)
        return cls(
            name=name,
            config=config,
            stream=stream,
            bundle=bundle,
            model=model,
            inference=Inference(manifest, model),
            input_columns=columns,
            config_digest=config_digest,
            keep_results=keep_results,
            tuning=tuning,
        )

    @property
    def step(self) -> int:
        return self.inference.step

    @property
    def window_rows(self) -> int:
        return self.inference.rows

    @property
    def bundle_ref(self) -> dict[str, Any]:
        manifest = self.bundle.manifest
        return {"name": manifest.name, "version": manifest.version, "digest": self.bundle.digest}
