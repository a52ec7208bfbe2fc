"""Labels as texts: classes whose names a spreadsheet would run keep their meaning in exported tables."""

import pytest

from agent.performance.labels import SEPARATOR, LabelSchema
from agent.text import csv_text

LABELS = ("-10 to 0", "+ve", "=1+1", "10\u00a0%", "-5", "'quoted")


@pytest.mark.parametrize("label", LABELS)
def test_a_class_is_read_back_from_the_cell_that_quotes_it(label: str) -> None:
    schema = LabelSchema("classify", LABELS)
    assert schema.parse(csv_text(label)) == schema.parse(label) == LABELS.index(label)


@pytest.mark.parametrize("first", range(len(LABELS)))
def test_several_classes_of_one_quoted_cell_are_read_back(first: int) -> None:
    schema = LabelSchema("several", LABELS)
    second = (first + 1) % len(LABELS)
    cell = csv_text(f"{LABELS[first]}{SEPARATOR}{LABELS[second]}")
    assert schema.parse(cell) == 2**first + 2**second


def test_a_quote_alone_makes_no_text_a_label() -> None:
    with pytest.raises(ValueError, match="no label of this model"):
        LabelSchema("classify", LABELS).parse("'-11 to 0")
