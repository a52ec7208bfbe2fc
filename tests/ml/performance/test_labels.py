"""Labels as texts: classes whose names a spreadsheet would run keep their meaning in exported tables."""

from unittest.mock import Mock

import pytest

from outstation.fleet.dataset.sample_labels import parse_numbers
from outstation.foundation.text import csv_text
from outstation.ml.performance import labels
from outstation.ml.performance.labels import SEPARATOR, LabelSchema

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


@pytest.mark.parametrize(
    "text", ["1_0", "\u0661", "nan", "inf", "-Infinity", "1e999", "0x10", "1 0", "1,5", ".", "e5", "+", ""]
)
def test_a_text_that_is_no_decimal_number_is_none_of_a_label_either(text: str) -> None:
    with pytest.raises(ValueError, match="no finite number"):
        LabelSchema("regress").parse(text)
    assert parse_numbers([*map(str, range(100)), text]) is None


@pytest.mark.parametrize(("text", "value"), [("7", 7.0), (" -1.5 ", -1.5), ("+.5", 0.5), ("2.", 2.0), ("1E-3", 0.001)])
def test_a_decimal_number_is_the_same_label_on_the_device_and_in_a_data_set(text: str, value: float) -> None:
    numbers = parse_numbers([*map(str, range(100)), text])
    assert numbers is not None
    assert LabelSchema("regress").parse(text) == numbers[-1] == value


@pytest.mark.attack("devices")
def test_made_up_predictions_do_not_search_all_labels_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Mock(side_effect=str)
    monkeypatch.setattr(labels, "printable", made)
    schema = LabelSchema("classify", tuple(f"c{i}" for i in range(1000)))
    for i in range(100):
        with pytest.raises(ValueError, match="no label of this model"):
            schema.parse(f"made-up-{i}")
    assert made.call_count == 1000


def test_a_text_of_more_names_than_a_model_may_have_is_refused() -> None:
    schema = LabelSchema("several", tuple("abcdefghijklmnop"))
    assert schema.parse("|".join(schema.labels)) == 2**16 - 1
    with pytest.raises(ValueError, match="this names more than the 16 labels that a model may have"):
        schema.parse("|".join([*schema.labels, "a"]))
