"""Label commands: each fits the limit, and together they carry all labels."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from outstation.device.intake import label_intake
from outstation.fleet.labelling.given_labels import split_labels
from outstation.ml.performance.labels import SOURCES, Label
from outstation.protocol.wire.commands import MAX_ARGUMENT_LENGTH

TEXTS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=256)
LABELS = st.builds(Label, st.integers(1, 2**53 - 1), st.none(), TEXTS, st.sampled_from(SOURCES)) | st.builds(
    Label, st.none(), st.integers(0, 4_102_444_800_000_000 - 1), TEXTS, st.sampled_from(SOURCES)
)


@given(st.lists(LABELS, max_size=12), st.integers(1, 60))
def test_a_device_reads_all_labels_from_the_commands(sample: list[Label], times: int) -> None:
    given_ = sample * times
    taken: list[Label] = []
    for first, end, text in split_labels(given_):
        assert len(text) <= MAX_ARGUMENT_LENGTH
        assert first == len(taken)
        lot = label_intake.parse_columns("task", msgspec.json.decode(text))
        assert lot.rejected == {}
        taken += lot.labels
        assert end == len(taken)
    for a, b in zip(taken, given_, strict=True):
        assert (a.t is None) == (b.t is None)
        assert abs((a.t or 0) - (b.t or 0)) <= 1
    assert [(a.row, a.text, a.source) for a in taken] == [(b.row, b.text, b.source) for b in given_]
