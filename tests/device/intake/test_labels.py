"""Label intake: each label is stored or rejected with line and reason, and acknowledged after its commit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.device.intake import label_intake
from outstation.device.intake.protocol import LineParser
from outstation.device.machine import secret_file
from outstation.device.store import label_store as labelled
from outstation.device.store.label_store import StoredLabel
from outstation.device.store.predictions import StoredPredictions
from outstation.foundation.errors import RowRejected
from outstation.ml.performance.labels import Label, LabelSchema, LabelTarget
from outstation.protocol.client import Client
from tests.kit.stations import STREAMS, Station, conf

T0 = 1_764_000_000_000_000
TARGETS = {"judge": LabelTarget("watch", {"": LabelSchema("classify", ("up", "down"))})}


@pytest.fixture
def station(tmp_path: Path) -> Iterator[Station]:
    """Results of rows 1 to 20, one each second, in a running intake."""
    with Station(conf(tmp_path), label_targets=lambda: TARGETS) as running:
        row = np.arange(1, 21, dtype=np.int64)
        with running.store.transaction() as tx:
            tx.labels.store_predictions(
                "judge", StoredPredictions("sha256:a", row, T0 + row * 1_000_000, row % 2, None, None, {}), 1.0
            )
        yield running


def stored_labels(station: Station) -> dict[int, str]:
    result: list[StoredLabel] = station.store.query(labelled.load_labelled, "judge", "sha256:a", 10**9, 10**6)
    return {item.prediction.row: item.label for item in result}


def test_a_label_is_acknowledged_once_it_is_on_the_disk(station: Station) -> None:
    with station.line() as line:
        line.send({"labels": "judge", "row": 3, "label": "up"})
        assert line.through(1) == {"through": 1, "accepted": 1, "rejected": []}
    assert stored_labels(station) == {3: "up"}


def test_labels_as_columns_and_by_time(station: Station) -> None:
    times = [(T0 + row * 1_000_000) / 1e6 for row in (4, 5)]
    with station.line() as line:
        line.send(
            {"labels": "judge", "columns": {"row": [1, 2], "label": ["up", "down"], "source": ["human", None]}},
            {"labels": "judge", "columns": {"t": times, "label": ["up", "up"]}},
            {"labels": "judge", "t": times[0] + 2.3, "label": "down"},
        )
        assert line.through(3)["accepted"] == 5
    assert stored_labels(station) == {1: "up", 2: "down", 4: "up", 5: "up", 6: "down"}


def test_labels_and_readings_share_a_connection(station: Station) -> None:
    with station.line() as line:
        line.send(
            *({"stream": "watch", "t": float(i), "ax": 0.0, "ay": 1.0} for i in range(40)),
            {"labels": "judge", "row": 1, "label": "up"},
            *({"stream": "watch", "t": float(i), "ax": 0.0, "ay": 1.0} for i in range(40, 80)),
        )
        assert line.through(81) == {"through": 81, "accepted": 81, "rejected": []}
    assert len(station.rows("watch")) == 80
    assert stored_labels(station) == {1: "up"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"labels": "judge", "row": 3, "label": "sideways"}, "this is no label of this model; it knows up, down"),
        ({"labels": "juge", "row": 3, "label": "up"}, "there is no task 'juge' that runs"),
        ({"labels": "judge", "row": 3}, 'no "label" in this line'),
        ({"labels": "judge", "label": "up"}, "give one of row and t"),
        ({"labels": "judge", "row": 3, "t": 1.0, "label": "up"}, "give one of row and t"),
        ({"labels": "judge", "row": 0, "label": "up"}, "row '0' is no row number; they count from 1"),
        ({"labels": "judge", "row": True, "label": "up"}, "row 'True' is no row number"),
        ({"labels": "judge", "row": 3.5, "label": "up"}, "is no row number"),
        ({"labels": "judge", "t": -1, "label": "up"}, "must be seconds since 1970"),
        ({"labels": "judge", "row": 3, "label": None}, "must be a number or text"),
        ({"labels": "judge", "row": 3, "label": "u\np"}, "must be a number or text"),
        ({"labels": "judge", "row": 3, "label": "up", "source": "hearsay"}, "must be one of human, model, system"),
        ({"labels": "judge", "row": 3, "label": "up", "sauce": 1}, "unknown field"),
        ({"labels": "judge", "row": 3, "columns": {"label": ["up"]}}, "move 'row' into it"),
        ({"labels": "judge", "columns": {"row": [1, 2], "label": ["up"]}}, "of one length"),
        ({"labels": "judge", "columns": {"row": [], "label": []}}, "of one length of at least 1"),
        ({"labels": 7, "row": 3, "label": "up"}, "expected `str`"),
        ({"labels": "judge", "row": 2**60, "label": "up"}, "is no row number"),
        ({"labels": "judge", "row": 900, "label": "up"}, "row 900 does not exist yet"),
        (b'{"labels":"judge","row":1,"row":2,"label":"up"}', "row"),
        ({"label": "up", "row": 3}, 'no "stream" in this line'),
    ],
)
def test_what_is_no_label_is_rejected_with_a_reason(station: Station, line: Any, reason: str) -> None:
    with station.line() as connection:
        connection.send(line)
        answer = connection.through(1)
    assert answer["accepted"] == 0
    assert [item["line"] for item in answer["rejected"]] == [1]
    assert reason in answer["rejected"][0]["reason"]
    assert stored_labels(station) == {}
    assert station.store.counters()["lines rejected"] == 1


def test_valid_labels_of_a_line_are_stored_and_invalid_ones_rejected(station: Station) -> None:
    with station.line() as line:
        line.send({"labels": "judge", "columns": {"row": [1, 2, -3, 4], "label": ["up", "left", "up", "down"]}})
        answer = line.through(1)
    assert answer["accepted"] == 2
    assert stored_labels(station) == {1: "up", 4: "down"}
    [rejected] = answer["rejected"]
    assert "label 2 of the columns: this is no label" in rejected["reason"]
    assert "label 3 of the columns: row '-3'" in rejected["reason"]


def test_a_named_client_that_comes_back_has_its_labels_once(station: Station) -> None:
    with Client(station.socket, name="annotator") as client:
        client.label("judge", "up", row=1)
        client.label("judge", "down", t=(T0 + 2_000_000) / 1e6, source="system")
        assert client.flush().accepted == 2
    with station.line() as line:
        line.send({"client": "annotator"})
        assert line.answer()["through"] == 2
    assert stored_labels(station) == {1: "up", 2: "down"}
    assert station.store.counters()["labels.judge"] == 2


def test_labels_that_find_no_room_are_turned_away_to_come_again(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(station.store), "limit_bytes", lambda self: 1)
    with station.line() as line:
        line.send({"labels": "judge", "row": 3, "label": "up"})
        answer = line.through(1)
    assert answer["accepted"] == 0
    assert answer["rejected"][0]["reason"].startswith("not stored: ")
    monkeypatch.undo()
    with station.line() as line:
        line.send({"labels": "judge", "row": 3, "label": "up"})
        assert line.through(1)["accepted"] == 1


@given(
    st.dictionaries(
        st.sampled_from(["labels", "row", "t", "label", "source", "columns"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers()),
    )
)
def test_any_json_is_labels_or_a_rejection(line: dict[str, Any]) -> None:
    try:
        lot = label_intake.parse_line(msgspec.json.encode(line))
    except (RowRejected, msgspec.MsgspecError, ValueError):
        return
    assert len(lot.labels) + len(lot.rejected) >= 1
    assert all(isinstance(item, Label) and (item.row is None) != (item.t is None) for item in lot.labels)


@given(st.binary(max_size=80))
def test_any_bytes_after_labels_are_read_to_an_end(tail: bytes) -> None:
    line = b'{"labels":"judge",' + tail.replace(b"\n", b" ")
    [taken] = list(LineParser(STREAMS).parse([line], 1, T0))
    assert taken.label_batch is not None or taken.rejected


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("classify", "down", 1.0),
        ("regress", "2.5", 2.5),
        ("regress", "-1e3", -1000.0),
        ("anomaly", "anomaly", 1.0),
        ("anomaly", "False", 0.0),
        ("anomaly", "0", 0.0),
    ],
)
def test_labels_mean_what_the_bundles_kind_says(kind: str, text: str, value: float) -> None:
    assert LabelSchema(kind, ("up", "down") if kind == "classify" else ()).parse(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("classify", "UP"),
        ("regress", "nan"),
        ("regress", "1_0"),
        ("regress", "up"),
        ("anomaly", "2"),
        ("regress", "1e160"),
        ("regress", "-1e101"),
    ],
)
def test_labels_that_mean_nothing_are_refused(kind: str, text: str) -> None:
    with pytest.raises(ValueError, match="label"):
        LabelSchema(kind, ("up", "down") if kind == "classify" else ()).parse(text)


KEY = bytes(range(32))


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Station]:
    """An intake that can verify authors, with the result of row 1."""
    with Station(conf(tmp_path), label_targets=lambda: TARGETS, label_key=KEY) as running:
        row = np.arange(1, 3, dtype=np.int64)
        with running.store.transaction() as tx:
            tx.labels.store_predictions(
                "judge", StoredPredictions("sha256:a", row, T0 + row * 1_000_000, row % 2, None, None, {}), 1.0
            )
        yield running


def test_a_label_knows_its_author_by_a_token(keyed: Station) -> None:
    token = secret_file.make_token(KEY, "power-meter")
    with keyed.line() as line:
        line.send(
            {"labels": "judge", "row": 1, "label": "up", "by": "power-meter", "token": token},
            {"labels": "judge", "row": 2, "label": "up"},
        )
        assert line.through(2)["accepted"] == 2
    stored: list[StoredLabel] = keyed.store.query(labelled.load_labelled, "judge", "sha256:a", 10**9, 10)
    assert [item.by for item in stored] == ["power-meter", ""]


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        ({"by": "eva"}, '"by" needs its "token"'),
        ({"token": "00"}, '"by" needs its "token"'),
        ({"by": "eva", "token": secret_file.make_token(KEY, "otto")}, "the token is not that of 'eva'"),
        ({"by": "eva", "token": secret_file.make_token(bytes(32), "eva")}, "the token is not that of 'eva'"),
        ({"by": "../eva", "token": "x"}, "the token is not that of '../eva'"),
        ({"by": ["eva"], "token": "x"}, '"by" needs its "token"'),
    ],
)
def test_a_forged_author_is_refused_and_its_label_is_not_stored(
    keyed: Station, claim: dict[str, object], reason: str
) -> None:
    with keyed.line() as line:
        line.send({"labels": "judge", "row": 1, "label": "up", **claim})
        [rejection] = line.through(1)["rejected"]
    assert reason in rejection["reason"]
    assert stored_labels(keyed) == {}
