"""Source of kind `sine`: a sine wave in every field, to try a task before its sensor is there."""

import asyncio
import math
from contextlib import suppress

from outstation.device.config.sources import SourceSection
from outstation.device.store.rows import RawColumns
from outstation.foundation.config.quantities import Duration
from outstation.foundation.errors import ConfigError, RowRejected


class Config(SourceSection, frozen=True, tag="sine"):
    period: Duration = Duration(60.0)
    interval: Duration = Duration(1.0)

    def check(self, file, key, fields):
        if self.interval < 0.01:
            raise ConfigError(file, f"{key}.interval", "must be at least 10 ms")


def check(context, source):
    return f"a sine wave of {source.period:g} s"


def build(context, source, store):
    return Sine(context.name, [field.name for field in context.stream.fields], source)


class Sine:
    def __init__(self, name, fields, source):
        self.name, self.fields, self.source = name, fields, source

    async def run(self, submit_rows):
        while True:
            value = math.sin(2 * math.pi * asyncio.get_running_loop().time() / self.source.period)
            # A stream may bound its fields: the daemon counts the rejected row.
            with suppress(RowRejected):
                await submit_rows(self.name, RawColumns(1, None, {name: [value] for name in self.fields}), None)
            await asyncio.sleep(self.source.interval)
