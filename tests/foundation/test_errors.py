"""Errors: what a worker process raises arrives as it was raised."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

# Declares a subclass outside the error tree.
from outstation.device.rollout.fetch import transport as transport
from outstation.fleet.database import interface as interface
from outstation.foundation.errors import OutstationError


def walk(kind: type[OutstationError]) -> Iterator[type[OutstationError]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from walk(subclass)


@pytest.mark.parametrize("kind", sorted(walk(OutstationError), key=str))
def test_every_error_survives_the_way_out_of_a_worker_process(kind: type[OutstationError]) -> None:
    parameters = inspect.signature(kind.__init__).parameters.values()
    texts = {each.name: "crash" if each.name == "kind" else f"the {each.name}" for each in parameters}
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD and each.name != "self"]
    options: dict[str, Any] = {each.name: texts[each.name] for each in parameters if each.kind is each.KEYWORD_ONLY}
    raised = kind(*(texts[name] for name in names), **options) if names else kind("a", "b")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        arrived = pickle.loads(pickle.dumps(raised, protocol))
        assert type(arrived) is kind
        assert (str(arrived), arrived.args, vars(arrived)) == (str(raised), raised.args, vars(raised))
