"""Samples of a device: which readings are sent, rounded and sealed, within the budget of the owner's config."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec.structs import replace

from outstation.device.config.samples import SamplesConfig
from outstation.device.samples import requests
from outstation.device.samples.rounding import round_to_digits
from outstation.foundation.errors import MessageRefused
from outstation.protocol.transport import sample_content
from outstation.protocol.transport.sample_content import SampleContent
from outstation.protocol.transport.sealing import Opener
from outstation.protocol.wire.keys import b64url_decode
from outstation.protocol.wire.messages import SamplesPayload
from outstation.protocol.wire.privacy.field_privacy import FieldPrivacy
from scripts.kit.bundles import CENTRES, CLASSIFY, activated
from tests.kit.devices import NOW
from tests.kit.sampled_devices import CONSENT, FALL, KEY, LATER, SampledDevice


@pytest.fixture
def make_device(tmp_path: Path) -> Iterator[Callable[..., SampledDevice]]:
    made: list[SampledDevice] = []

    def make(config: SamplesConfig = CONSENT, *, alerts: bool = True) -> SampledDevice:
        folder = tmp_path / str(len(made))
        made.append(SampledDevice(folder, CLASSIFY, activated(CLASSIFY), alerts=[FALL] if alerts else []))
        made[-1].consent(config)
        return made[-1]

    yield make
    for device in made:
        device.store.close()


def opened(sample: SamplesPayload) -> SampleContent:
    topic = f"outstation/acme/{sample.device}/samples/{sample.task}"
    return sample_content.decode(Opener([KEY]).open_content(topic, b64url_decode(sample.sealed)), sample.n)


def test_readings_around_an_alert_are_sent_once_their_later_rows_have_arrived(
    make_device: Callable[..., SampledDevice],
) -> None:
    device = make_device()
    device.feed_text("rrrrrl")
    assert device.send() == []
    device.feed_text("rr")
    [sample] = device.send(replace(NOW, boot_s=NOW.boot_s + 3))
    assert (sample.reason, sample.subject, sample.row) == ("alert", "tiny/fall/result/1", 6)
    assert (sample.rows, sample.n, sample.stream, sample.model.name) == ((4, 8), 5, "watch", "tiny")
    content = opened(sample)
    assert content.fields == list(device.active.bundle.manifest.input.fields)
    assert content.consent == CONSENT.consent
    assert np.diff(content.t).tolist() == [10_000] * 4
    values = np.array(content.columns).T
    assert values == pytest.approx(CENTRES[[1, 1, 0, 1, 1]], rel=1e-3)
    assert device.status()["sent"] == 1
    assert requests.load(device.store, "tiny").waiting == []


def test_rows_that_do_not_come_are_not_waited_for_longer_than_ten_minutes(
    make_device: Callable[..., SampledDevice],
) -> None:
    device = make_device()
    device.feed_text("rrrrrl")
    assert device.send() == []
    [sample] = device.send(LATER)
    assert sample.rows == (4, 6)


def test_the_sealed_readings_open_with_no_other_key_and_for_no_other_topic(
    make_device: Callable[..., SampledDevice],
) -> None:
    device = make_device()
    device.feed_text("rrrrrlrr")
    [sample] = device.send()
    sealed = b64url_decode(sample.sealed)
    for key, task in ((X25519PrivateKey.generate(), "tiny"), (KEY, "other")):
        with pytest.raises(MessageRefused):
            Opener([key]).open_content(f"outstation/acme/pi-07/samples/{task}", sealed)
    stored = b"".join(pending.payload for pending in device.store.unacknowledged_messages(0, 100))
    assert b"Mira" not in stored
    assert base64.b64encode(b"Mira") not in stored


def test_the_least_certain_results_below_the_limit_are_sampled_and_take_half_the_budget(
    make_device: Callable[..., SampledDevice],
) -> None:
    device = make_device(replace(CONSENT, uncertain_below=0.999, max_per_day=4096, max_message=2048), alerts=False)
    between = (CENTRES[0] + CENTRES[1]) / 2
    rows = np.tile(CENTRES[1], (60, 1))
    rows[[10, 20, 30, 40, 50]] = between
    device.feed(rows.astype(np.float32))
    device.run_all()
    samples = device.send()
    assert {sample.reason for sample in samples} == {"uncertain"}
    status = device.status()
    assert len(samples) + status["dropped"]["budget"] == 4
    assert 0 < status["bytes_today"] <= 2048
    # An alert still finds its half.
    device.consent(device.config)
    with device.store.transaction() as tx:
        assert device.task.samples is not None
        requests.add(tx, "tiny", [device.task.samples.request("requested", 5, 1, "c1")])
    assert [sample.reason for sample in device.send()][-1] == "requested"


def test_the_budget_of_a_day_survives_a_restart_and_is_renewed_after_a_day_of_uptime(
    make_device: Callable[..., SampledDevice],
) -> None:
    device = make_device(replace(CONSENT, max_per_day=2048, max_message=2048))
    device.feed_text("rrrrrlrrrrrrrrrrlrr")
    assert len(device.send()) == 1
    assert device.status()["dropped"] == {"budget": 1}
    device.restart()
    device.consent(device.config)
    device.feed_text("rrrrrlrrrr")
    assert len(device.send()) == 1
    assert device.status()["dropped"] == {"budget": 2}
    device.feed_text("rrrrrlrrrr")
    assert len(device.send(replace(NOW, boot_s=NOW.boot_s + 86_401))) == 2


def test_a_message_above_the_limit_loses_the_rows_far_from_the_result(
    make_device: Callable[..., SampledDevice],
) -> None:
    device = make_device(replace(CONSENT, windows=1000, digits=7, max_message=2048))
    random = np.random.default_rng(3)
    rows = np.tile(CENTRES[1], (1200, 1)) + random.normal(0, 1e-3, (1200, 4)).astype(np.float32)
    rows[1000] = CENTRES[0]
    device.feed(rows.astype(np.float32))
    device.run_all()
    device.send()
    samples = device.send(LATER)
    pending = [each for each in device.store.unacknowledged_messages(0, 1000) if "/samples/" in each.topic]
    assert all(len(each.payload) <= 2048 for each in pending)
    [sample] = [each for each in samples if each.row == 1001]
    assert 10 < sample.n < 1000


@pytest.mark.parametrize("limit", ["MAX_SAMPLE_ROWS", "MAX_CONTENT_BYTES"])
def test_readings_that_compress_well_stay_within_the_rows_and_bytes_that_a_collector_accepts(
    make_device: Callable[..., SampledDevice], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    most = {"MAX_SAMPLE_ROWS": 300, "MAX_CONTENT_BYTES": 9000}[limit]
    monkeypatch.setattr(sample_content, limit, most)
    device = make_device(replace(CONSENT, windows=1000))
    device.feed_text("r" * 500 + "l" + "r" * 500)
    device.send()
    [sample] = [each for each in device.send(LATER) if each.row == 501]
    content = opened(sample)
    assert 100 < len(content.t) == sample.n <= 300
    assert sample.rows[0] <= 501 <= sample.rows[1]


def test_a_defect_of_the_encoding_is_not_counted_as_a_sample_that_is_too_large(
    make_device: Callable[..., SampledDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise ValueError("defect")

    device = make_device()
    device.feed_text("r" * 500 + "l" + "r" * 500)
    monkeypatch.setattr(sample_content, "encode", fail)
    with pytest.raises(ValueError, match="defect"):
        device.send(LATER)


def test_fewer_rows_than_the_least_count_are_never_sent(make_device: Callable[..., SampledDevice]) -> None:
    device = make_device()
    device.author.min_count = 10
    device.feed_text("rrl")
    device.send()
    assert device.send(LATER) == []
    assert device.status()["dropped"] == {"few": 1}
    # Where there are so many, as many are sent.
    device.feed_text("r" * 20 + "l" + "r" * 20)
    assert [sample.n for sample in device.send(replace(LATER, boot_s=LATER.boot_s + 9))] == [11]


def test_the_owners_rules_for_fields_hold_for_samples(make_device: Callable[..., SampledDevice]) -> None:
    device = make_device()
    fields = frozenset({"extra", *device.task.bundle.manifest.input.fields})
    private, stepped, *others = device.task.bundle.manifest.input.fields
    rules = FieldPrivacy(fields, frozenset({private}), {stepped: 0.5})
    device.author.privacy = {"tiny": rules}
    device.feed((CENTRES[[1, 1, 1, 0, 1, 1]] + 0.123).astype(np.float32))
    device.run_all()
    [sample] = device.send()
    content = opened(sample)
    assert content.fields == [stepped, *others]
    assert set(content.columns[0].tolist()) == {2.0, 0.0}
    for limited in (replace(rules, kinds=frozenset({"alerts"})), replace(rules, min_results=5)):
        device.author.privacy = {"tiny": limited}
        device.feed_text("r" * 9 + "lrr")
        device.send(replace(LATER, boot_s=LATER.boot_s + 1000 * limited.min_results))
    assert len(device.samples()) == 1
    assert device.status()["dropped"] == {"private": 2}


def test_rows_that_were_sent_are_not_sent_again(make_device: Callable[..., SampledDevice]) -> None:
    device = make_device(replace(CONSENT, windows=5))
    device.feed_text("rrrrrrrlrlrlrrrrrrr")
    assert len(device.send()) == 1
    assert device.status()["covered"] == 2


def test_deleted_rows_are_counted(make_device: Callable[..., SampledDevice]) -> None:
    device = make_device()
    device.feed_text("rrrrrlrr")
    with device.store.transaction() as tx:
        tx.trim_rows("watch", 8, 2**62, 10)
    assert device.send() == []
    assert device.status()["dropped"] == {"gone": 1}


def test_the_queue_is_bounded_and_gives_up_uncertain_results_first(make_device: Callable[..., SampledDevice]) -> None:
    device = make_device()
    task = device.task.samples
    assert task is not None
    with device.store.transaction() as tx:
        requests.add(tx, "tiny", [task.request("alert", 100 * n, 1) for n in range(1, 61)])
        requests.add(tx, "tiny", [task.request("uncertain", 100 * n, 1) for n in range(61, 71)])
        requests.add(tx, "tiny", [task.request("requested", 100 * n, 1) for n in range(71, 75)])
    waiting = [request.reason for request in requests.load(device.store, "tiny").waiting]
    assert (waiting.count("alert"), waiting.count("uncertain"), waiting.count("requested")) == (60, 0, 4)
    assert device.status()["dropped"] == {"queue": 10}


@pytest.mark.parametrize("magnitude", [-280, -45, -7, 0, 5, 30, 290])
def test_values_keep_their_significant_digits(magnitude: int) -> None:
    random = np.random.default_rng(magnitude + 300)
    values = random.normal(size=200) * 10.0**magnitude
    for digits in (1, 4, 7):
        expected = [float(f"{value:.{digits - 1}e}") for value in values.tolist()]
        assert round_to_digits(values, digits) == pytest.approx(expected, rel=1e-13, abs=0)
    special = round_to_digits(np.array([0.0, np.nan, np.inf, -0.0]), 4)
    assert np.array_equal(special, [0.0, np.nan, np.inf, 0.0], equal_nan=True)
