"""Selection of samples in a batch: results with an alert, and the least certain ones below the owner's limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np

from outstation.device.config import FieldConfig, SamplesConfig
from outstation.device.samples.budget import Reason
from outstation.device.samples.joined_readings import JoinedSource
from outstation.device.samples.requests import SampleRequest
from outstation.foundation.arrays import Float64s, Ints
from outstation.ml.model.bundle.bundle import Bundle
from outstation.protocol.wire.messages import ModelRef

# Uncertain results of one batch; a model that is uncertain of all would fill the queue.
_MAX_UNCERTAIN = 4
NO_JOINED_STREAMS: Mapping[str, tuple[str, Sequence[FieldConfig]]] = {}


class SampledTask(msgspec.Struct, frozen=True):
    """A task whose readings may be sent: its stream, the model's fields, and the shape of a model window.

    `history`: rows before a window that its features look back at; `joined`: the streams of further inputs.
    """

    config: SamplesConfig
    name: str
    stream: str
    stream_fields: Sequence[FieldConfig]
    fields: Sequence[str]
    window_rows: int
    step: int
    history: int
    model: ModelRef
    joined: Mapping[str, JoinedSource] = {}

    @classmethod
    def from_bundle(
        cls,
        config: SamplesConfig,
        names: tuple[str, str],
        fields: Sequence[FieldConfig],
        bundle: Bundle,
        joined: Mapping[str, tuple[str, Sequence[FieldConfig]]] = NO_JOINED_STREAMS,
    ) -> SampledTask:
        """Return the task with these `names`, of task and stream, while it runs `bundle`.

        `joined`: stream and all its fields of each further input.
        """
        manifest = bundle.manifest
        spec, window = manifest.input, manifest.input.window
        step = 1 if window is None else window.step
        model = ModelRef(manifest.name, manifest.version, bundle.digest)
        sources = {name: JoinedSource(*joined[name], spec) for name, spec in manifest.joined.items()}
        return cls(config, *names, fields, spec.fields, spec.rows, step, spec.history_rows, model, sources)

    def has_results(self, cursor: int, request: SampleRequest) -> bool:
        """Return True if the task is done with all windows of a request once it consumed row `cursor`."""
        return cursor >= request.last - max(0, self.window_rows - self.step)

    def request(self, reason: Reason, row: int, least_count: int, subject: str = "") -> SampleRequest:
        """Return the request for the rows around the result at `row`, at least the least count."""
        begin = max(1, row - self.window_rows + 1)
        windows = max(self.config.windows, -(-(least_count - self.window_rows) // (2 * self.step)))
        before = min(windows + -(-self.history // self.step), (begin - 1) // self.step)
        last = row + windows * self.step
        return SampleRequest(reason, subject, row, begin, begin - before * self.step, last, self.step, self.model)

    def select(
        self, ends: Ints, score: Float64s | None, alerts: Iterable[tuple[int, str]], least_count: int
    ) -> list[SampleRequest]:
        """Return the requests of a batch whose results lie at the rows `ends` (w,), with their `score` (w,).

        `alerts`: row and id of each alert that was raised. A row before the batch stays as it is.
        """
        requests = []
        if self.config.on_alert:
            requests += [self.request("alert", row, least_count, subject) for row, subject in alerts]
        limit = self.config.uncertain_below
        if limit is not None and score is not None:
            uncertain = np.flatnonzero(score < limit)
            least = uncertain[np.argsort(score[uncertain], kind="stable")[:_MAX_UNCERTAIN]]
            requests += [self.request("uncertain", int(ends[index]), least_count) for index in np.sort(least)]
        return requests
