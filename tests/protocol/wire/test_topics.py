"""Topic tree: valid topics round-trip, others are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.foundation.errors import MessageRefused
from outstation.protocol.wire import topics
from outstation.protocol.wire.topics import Topic

NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
PLAIN = st.sampled_from([kind.name for kind in topics.KINDS.values() if not kind.per_task])
PER_TASK = st.sampled_from([kind.name for kind in topics.KINDS.values() if kind.per_task])


@given(NAMES, NAMES, PLAIN)
def test_a_topic_without_a_task_round_trips(fleet: str, device: str, kind: str) -> None:
    topic = Topic(fleet, device, kind)
    assert topics.parse(str(topic)) == topic


@given(NAMES, NAMES, PER_TASK, NAMES)
def test_a_topic_with_a_task_round_trips(fleet: str, device: str, kind: str, task: str) -> None:
    topic = Topic(fleet, device, kind, task)
    assert topics.parse(str(topic)) == topic


def test_topics_of_device_alerts_and_groups() -> None:
    assert topics.parse("outstation/acme/pi-07/alerts/_device").task == topics.DEVICE_ALERTS
    assert topics.parse("outstation/acme/_all/desired").device == topics.ALL_DEVICES
    assert topics.parse("outstation/acme/_group/desired/roof") == Topic("acme", topics.DEVICE_GROUP, "desired", "roof")


PARTS = st.sampled_from(
    [
        "outstation",
        "acme",
        "pi-07",
        "results",
        "health",
        "ack",
        "exercise",
        "_device",
        "",
        "#",
        "+",
        "..",
        "A",
        "é",
        "\n",
    ]
)


@given(st.text() | st.lists(PARTS | st.text(max_size=3), max_size=7).map("/".join))
def test_any_text_round_trips_or_is_refused(text: str) -> None:
    try:
        outcome = str(topics.parse(text))
    except MessageRefused as refused:
        outcome = refused.reason
    assert outcome in (text, "topic")


@pytest.mark.parametrize(
    "text",
    [
        "outstation/acme/pi-07",
        "outstation/acme/pi-07/results",
        "outstation/acme/pi-07/results/",
        "outstation/acme/pi-07/results/exercise/more",
        "outstation/acme/pi-07/health/exercise",
        "outstation/acme/pi-07/desired/roof",
        "outstation/acme/_group/desired",
        "outstation/acme/_group/cmd/roof",
        "outstation/acme/pi-07/health/",
        "outstation/acme/pi-07/unknown",
        "outstation/acme/pi-07/results/#",
        "outstation/acme/+/health",
        "outstation/acme/pi-07/results/Exercise",
        "outstation/acme/../health",
        "outstation/acme/pi-07\n/health",
        "outstation/acme/pi-07/health\n",
        "/outstation/acme/pi-07/health",
        "outstation//pi-07/health",
        "Outstation/acme/pi-07/health",
        "other/acme/pi-07/health",
        "outstation/acme/_all/health",
        "outstation/acme/pi-07/results/_device",
        f"outstation/acme/{'a' * 65}/health",
        "$SYS/broker/uptime",
    ],
)
def test_a_topic_that_is_not_in_the_tree_is_refused(text: str) -> None:
    with pytest.raises(MessageRefused, match="topic"):
        topics.parse(text)
