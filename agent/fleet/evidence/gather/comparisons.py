"""What devices told of two bundles on the same windows: figures with their intervals, counted from signed messages.

Counted once when a folder is made and again when it is verified, by the code that devices themselves judge by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from agent.comparison import paired_intervals
from agent.comparison.paired_intervals import Block, Estimate
from agent.comparison.tally import Tally
from agent.fleet.evidence.contents import Compared, Figure, Model, Place
from agent.fleet.evidence.limits import MOST
from agent.wire.messages import Model as Told
from agent.wire.messages import Shadow

_Key = tuple[str, str, str, str, str]


class Comparisons(msgspec.Struct):
    """By roll-out, device, task and pair of bundles, messages as they come: by device, log and seq."""

    left_out: int = 0
    _told: dict[_Key, list[Shadow]] = msgspec.field(default_factory=dict)
    _dropped: Counter[_Key] = msgspec.field(default_factory=Counter)

    def add(self, body: Shadow) -> None:
        key = (body.rollout, body.device, body.task, body.model.digest, body.beside.digest)
        if key not in self._told and len(self._told) >= MOST.comparisons:
            self.left_out += 1
            return
        of = self._told.setdefault(key, [])
        of.append(body)
        if len(of) > MOST.compared:
            # The newest stay: they lie beside one another, which intervals go by.
            del of[0]
            self._dropped[key] += 1

    def all(self, digests: Mapping[str, str]) -> list[Compared]:
        """`digests`: of the new bundle of each roll-out; the bundle beside is taken for it where that is not known."""
        return [
            compared(told, new_is_beside=digests.get(key[0]) != key[3], left_out=self._dropped[key])
            for key, told in sorted(self._told.items())
        ]


def compared(told: Sequence[Shadow], *, new_is_beside: bool, left_out: int = 0) -> Compared:
    """Of one device, roll-out, task and pair; `told` is not empty."""
    last = told[-1]
    blocks = [Block(Tally.of(one)) for one in told]
    total = sum((block.tally for block in blocks), Tally())
    return Compared(
        rollout=last.rollout,
        device=last.device,
        task=last.task,
        new=_model(last.beside if new_is_beside else last.model),
        old=_model(last.model if new_is_beside else last.beside),
        new_is_beside=new_is_beside,
        batches=total.batches,
        errors=total.errors,
        windows=total.n,
        same=total.same,
        labelled=sum(total.labelled),
        figures=list(_figures(blocks, new_is_beside)),
        places=[Place(one.device, one.log, one.seq) for one in told],
        left_out=left_out,
    )


def of(messages: Iterable[Shadow]) -> set[_Key]:
    """What these are about: one of it, where they belong together."""
    return {(one.rollout, one.device, one.task, one.model.digest, one.beside.digest) for one in messages}


def _figures(blocks: Sequence[Block], new_is_beside: bool) -> Iterator[Figure]:
    yield _figure("agreement", paired_intervals.agreement(blocks))
    yield _figure("time", paired_intervals.slowness(blocks, new_is_beside=new_is_beside))
    if any(sum(one.tally.labelled) for one in blocks):
        yield _figure("accuracy by labels", paired_intervals.labelled_gain(blocks, new_is_beside=new_is_beside))
    if any(one.tally.model.expected.n and one.tally.beside.expected.n for one in blocks):
        yield _figure("expected accuracy", paired_intervals.expected_gain(blocks, new_is_beside=new_is_beside))
    if any(one.tally.model.off.n and one.tally.beside.off.n for one in blocks):
        yield _figure("error by labels", paired_intervals.error_growth(blocks, new_is_beside=new_is_beside))


def _figure(name: str, found: Estimate | None) -> Figure:
    if found is None:
        return Figure(name)
    # Sums of the same numbers can differ in the last digits from machine to machine.
    return Figure(name, round(found.value, 6), round(found.low, 6), round(found.high, 6), found.n)


def _model(told: Told) -> Model:
    return Model(told.name, told.version, told.digest)
