"""Field privacy: what is left of a message about fields that their owner protects."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outstation.device import config
from outstation.device.bootstrap.device import build_privacy
from outstation.device.config.stream_privacy import StreamPrivacy
from outstation.ml.drift.reporting import parsed_message
from outstation.protocol.wire.privacy.field_privacy import FieldPrivacy, combine
from tests.protocol.wire.test_least_count import drift, field

pytestmark = pytest.mark.attack("privacy")

NOW_US, DAY_US = 1_764_022_680_000_000, 86_400_000_000
RULES = FieldPrivacy(
    fields=frozenset({"t", "u", "v", "room"}),
    private=frozenset({"t"}),
    steps={"u": 0.5},
    hashed=frozenset({"room"}),
    key=b"k" * 32,
    period_s=86_400.0,
)
SECRET = 36.6


def test_of_a_private_field_no_number_leaves_in_a_drift_message_and_a_reader_still_parses_it() -> None:
    body = RULES.apply("drift", drift(60, t=field([0, 60, 0]), u=field([0, 60, 0]), v=field([0, 60, 0])), NOW_US)
    own = body["features"]["t"]
    assert (own["mean"], own["m2"], own["counts"], own["withheld"], own["missing"]) == (None, None, [0], 60, 0)
    assert (own["state"], own["fault"], own["cusum"]) == ("insufficient", None, {"limit": None})
    assert body["joint"]["cusum"] is None
    assert body["features"]["u"]["mean"] == 36.5
    assert body["features"]["v"]["mean"] == SECRET
    read = parsed_message.from_message(dict(body), (0, 1))
    assert read.fields["t"].withheld == 60


def test_a_field_that_the_bundle_computes_is_private_as_soon_as_any_field_is_protected() -> None:
    body = RULES.apply("drift", drift(60, computed=field([0, 60, 0])), NOW_US)
    assert body["features"]["computed"]["mean"] is None
    open_rules = FieldPrivacy(fields=frozenset({"t"}))
    assert open_rules.apply("drift", drift(60, computed=field([0, 60, 0])), NOW_US)["features"]["computed"]["mean"]


def alert(subject: str, kind: str = "drift", **evidence: Any) -> dict[str, Any]:
    return {
        "alert": kind,
        "subject": subject,
        "state": "raised",
        "summary": f"{subject}: mean {SECRET}, was 20.",
        "evidence": {"seq": 3, "test": "mean", "now": SECRET, **evidence},
    }


@pytest.mark.parametrize("subject", ["t", "u", "room", "computed", "joint", "reference"])
@pytest.mark.parametrize("kind", ["drift", "fault"])
def test_an_alert_about_a_protected_field_says_that_it_was_raised_and_no_number(subject: str, kind: str) -> None:
    body = RULES.apply("alerts", alert(subject, kind), NOW_US)
    assert str(SECRET) not in json.dumps(body)
    assert body["summary"].startswith(f"{subject}: {kind} raised")
    assert body["evidence"] == {"seq": 3}


def test_an_alert_of_another_field_that_names_a_protected_one_has_no_numbers() -> None:
    swapped = {**alert("v", "fault"), "summary": f"v: reads like t did ({SECRET})."}
    assert str(SECRET) not in json.dumps(RULES.apply("alerts", swapped, NOW_US))
    nested = alert("v", "fault", partners=[{"name": "t"}])
    assert str(SECRET) not in json.dumps(RULES.apply("alerts", nested, NOW_US))
    assert RULES.apply("alerts", alert("v"), NOW_US) == alert("v")
    assert RULES.apply("alerts", alert("output"), NOW_US) == alert("output")


@pytest.mark.parametrize("name", ["output.x", "output", "score", "rate"])
def test_a_private_field_with_the_name_of_an_output_hides_the_numbers_of_an_alert_about_it(name: str) -> None:
    rules = FieldPrivacy(fields=frozenset({name}), private=frozenset({name}))
    sentence = {**alert(name), "summary": f"it fell by {SECRET}"}
    assert str(SECRET) not in json.dumps(rules.apply("alerts", sentence, NOW_US))
    others = FieldPrivacy(fields=frozenset({"t"}), private=frozenset({"t"}))
    assert others.apply("alerts", sentence, NOW_US) == sentence


def test_slices_of_a_private_field_are_left_out_and_those_of_a_hashed_one_are_renamed_each_period() -> None:
    rules = FieldPrivacy(fields=frozenset({"room", "sex"}), private=frozenset({"sex"}), hashed=frozenset({"room"}))
    metrics = [{"metric": "accuracy", "slice": text, "n": 40} for text in ("", "class=ill", "sex=f", "room=R 7")]
    first = rules.apply("quality", {"metrics": metrics}, NOW_US)
    assert [m["slice"] for m in first["metrics"]][:2] == ["", "class=ill"]
    assert first["withheld"] == 1
    hashed = first["metrics"][2]["slice"]
    assert hashed.startswith("room=h:")
    assert len(hashed) == len("room=h:") + 12
    again = rules.apply("quality", {"metrics": metrics}, NOW_US + 3_600_000_000)
    assert again["metrics"][2]["slice"] == hashed
    later = rules.apply("quality", {"metrics": metrics}, NOW_US + 60 * DAY_US)
    assert later["metrics"][2]["slice"] != hashed


def test_hashes_depend_on_the_devices_key_and_on_the_field() -> None:
    other = FieldPrivacy(hashed=frozenset({"room"}), key=b"x" * 32, period_s=86_400.0)
    assert RULES.hash_text("room", "R 7", NOW_US) != other.hash_text("room", "R 7", NOW_US)
    assert RULES.hash_text("room", "R 7", NOW_US) != RULES.hash_text("bed", "R 7", NOW_US)


def test_events_and_replies_keep_to_the_rules_of_all_streams() -> None:
    rules = combine([RULES, FieldPrivacy(fields=frozenset({"w"}), private=frozenset({"w"}))])
    numbers = {"n": 1600, "mean": SECRET, "sd": 0.317}
    body = {
        "event": "learned",
        "summary": f"ward: learned. Warning: t below {SECRET}.",
        "evidence": {
            "task": "ward",
            "fields": dict.fromkeys(("t", "u", "v", "w"), numbers),
            "smallest_changes": {"windows": 3, "fields": {"t": {"shift": SECRET}, "v": {"shift": 1.25}}},
            "quality": {"metrics": [{"slice": "room=R 7", "n": 80}, {"slice": "v=below 3", "n": 80}]},
            "deviations": [{"field": "t", "shift": SECRET}, {"field": "v", "shift": 1.25}],
        },
    }
    limited = rules.apply("audit", body, NOW_US)
    evidence = limited["evidence"]
    assert evidence["fields"] == {
        "t": {"withheld": 1},
        "u": {"n": 1600, "mean": 36.5, "sd": 0.5},
        "v": numbers,
        "w": {"withheld": 1},
    }
    assert evidence["smallest_changes"] == {"windows": 3, "fields": {"t": {"withheld": 1}, "v": {"shift": 1.25}}}
    assert evidence["deviations"] == [{"field": "t", "withheld": 1}, {"field": "v", "shift": 1.25}]
    assert evidence["quality"]["metrics"] == [{"withheld": 1}, {"slice": "v=below 3", "n": 80}]
    assert limited["summary"].startswith("withheld")
    assert limited["event"] == "learned"


def test_a_streams_least_counts_hold_for_messages_about_the_device() -> None:
    rules = combine([RULES, FieldPrivacy(min_count=20, min_results=3), FieldPrivacy(min_count=5, min_results=7)])
    assert (rules.min_count, rules.min_results) == (20, 7)


def test_a_protected_stream_withholds_no_reference_of_an_open_stream() -> None:
    numbers = {"ax": {"n": 1600, "mean": 1.5, "sd": 0.3}}
    streams = {
        "ward": config.StreamConfig([config.FieldConfig("pulse")], privacy=StreamPrivacy(private=["pulse"])),
        "watch": config.StreamConfig([config.FieldConfig("ax")]),
    }
    tasks = {name: config.TaskConfig(name, "tiny") for name in streams}
    conf = config.Config(config.DeviceConfig("pi-07", "acme"), streams=streams, tasks=tasks)
    rules = combine(build_privacy(conf, b"secret").values())
    body = {"event": "learned", "summary": "vibration: learned", "evidence": {"task": "vibration", "fields": numbers}}
    assert rules.apply("audit", body, NOW_US)["evidence"]["fields"] == numbers


@pytest.mark.parametrize("text", ["t=36.6", "ward.t: 36.6", "'t'=36.6", "mean of ward.t 36.6"])
def test_a_short_text_or_a_name_behind_a_stream_hides_no_number_of_a_private_field(text: str) -> None:
    assert RULES.apply("audit", {"event": "x", "summary": text}, NOW_US)["summary"].startswith("withheld")
    named = {"event": "x", "id": "ward/t/drift/1", "field": "t", "stream": "ward-t"}
    assert RULES.apply("audit", named, NOW_US) == named


def test_readings_leave_as_their_fields_may() -> None:
    assert RULES.protect_column("t", [SECRET], NOW_US) is None
    assert RULES.protect_column("u", [SECRET, None], NOW_US) == [36.5, None]
    assert RULES.protect_column("v", [SECRET], NOW_US) == [SECRET]
    [hashed, missing] = RULES.protect_column("room", ["R 7", None], NOW_US) or []
    assert hashed == RULES.hash_text("room", "R 7", NOW_US)
    assert missing is None


def test_messages_that_the_owner_keeps_stay_and_results_only_lose_their_predictions() -> None:
    rules = FieldPrivacy(kinds=frozenset({"alerts"}))
    assert [rules.keeps(kind) for kind in ("drift", "quality", "alerts", "results", "audit", "health")] == [
        *(True, True, False),
        *(False, False, False),
    ]
    assert not rules.lists_results
    assert FieldPrivacy().lists_results


def test_without_rules_a_message_is_the_same_object() -> None:
    body = drift(60, t=field([0, 60, 0]))
    assert FieldPrivacy().apply("drift", body, NOW_US) is body
