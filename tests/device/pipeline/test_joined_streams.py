"""Joined streams: batches in any pieces give the bits of the whole data, and windows wait for what may still come."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from outstation.device import config
from outstation.device.batch_parts import joined_streams
from outstation.device.batch_parts.joined_streams import JoinedStream, JoinedWait, load_positions
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.bootstrap.assembly import assemble_task
from outstation.device.cli.owner.disclose import build_disclosure
from outstation.device.cli.status import _format_joined
from outstation.device.rollout import shadow_windows
from outstation.device.rollout.shadow import ShadowRunner
from outstation.device.store import task_keys
from outstation.device.store.row_batch import RowBatch
from outstation.device.store.rows import Rows
from outstation.fleet.cli.disclosed import compare_joined
from outstation.foundation.clock import ClockReading
from outstation.foundation.config.quantities import Duration
from outstation.foundation.errors import UsageError
from outstation.ml.model.activation import LoadedBundle
from outstation.ml.model.bundle import bundle
from outstation.ml.model.inference import features, runtime
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.inference import Inference, InferenceResult
from outstation.ml.model.inference.joins import JoinedRows
from outstation.protocol.wire.commitment import DisclosedJoin, Disclosure
from outstation.protocol.wire.messages import ResultsPayload
from outstation.workbench.authoring import pack
from scripts.kit.bundles import KEY, WINDOW, WINDOWED, Recipe, waves, write_joined_spec
from tests.kit.devices import NOW, STEP_US, T0, Device, columns, tiles
from tests.kit.shadow_devices import Recorder

WEATHER_STEP_US = 310_000
WAIT_S = 10.0


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    pack.write_bundle(pack.pack(write_joined_spec(tmp_path), KEY), tmp_path / "bundle")
    loaded = bundle.read(tmp_path / "bundle", [KEY.public])
    model = runtime.load_model(loaded.manifest, loaded.model_bytes)
    air = config.StreamConfig(fields=[config.FieldConfig(name=name) for name in ("other", "air")])
    streams = {"weather": JoinedStream("weather", air, WAIT_S)}
    recipe = Recipe("classify", "joined_int8", fields=WINDOWED)
    made = Device(tmp_path / "store", recipe, LoadedBundle(loaded, None, None, model), joined_streams=streams)
    yield made
    made.store.close()


def feed_weather(device: Device, values: NDArray[np.float32], first: int) -> None:
    t = T0 + (first + np.arange(len(values))) * WEATHER_STEP_US
    with device.store.transaction() as tx:
        tx.append("weather", Rows(t, (np.zeros(len(values), "<f4"), values)), "synced")


def test_batches_in_pieces_give_the_results_of_the_whole_data(device: Device) -> None:
    rows, air = waves(900, seed=3), waves(40, seed=4)[:, 0].copy()
    fed_rows = fed_air = 0
    random = np.random.default_rng(5)
    while fed_rows < len(rows) or fed_air < len(air):
        if random.random() < 0.6:
            count = int(random.integers(1, 120))
            if len(piece := rows[fed_rows : fed_rows + count]):
                device.feed(piece)
                fed_rows += len(piece)
        elif len(piece := air[fed_air : fed_air + int(random.integers(1, 6))]):
            feed_weather(device, piece, fed_air)
            fed_air += len(piece)
        device.run_all()
        if random.random() < 0.2:
            device.restart()
    manifest = device.active.bundle.manifest
    joined = JoinedRows(air[:, None], T0 + np.arange(len(air)) * WEATHER_STEP_US)
    whole = Inference(manifest, device.active.model).run(
        rows, T0 + np.arange(len(rows)) * STEP_US, joined={"weather": joined}
    )
    results = device.results()
    listed = columns(results)
    assert tiles(results) == (1, whole.cut.consumed)
    assert listed["row"] == (whole.cut.starts + WINDOW).tolist()
    assert listed["score"] == np.round(np.asarray(whole.scores.score), 4).tolist()
    # Columns of further outputs are no members of the wire's struct: they are read from the payload.
    payloads = [msgspec.json.decode(message.payload) for message in device.messages()]
    wear = [value for payload in payloads for value in payload["columns"]["value_wear"]]
    assert wear == [float(f"{v:.6g}") for v in whole.scores.extra_columns["value_wear"]]
    assert payloads[-1]["joined"]["weather"]["stream"] == "weather"
    # Rows that no later window needs may go: the last one took rows 28 to 30.
    assert load_positions(device.store, "tiny")["weather"].row == 28


def feed_at(device: Device, first_us: int, count: int) -> None:
    values = waves(count)
    with device.store.transaction() as tx:
        t = T0 + first_us + np.arange(count) * STEP_US
        tx.append("watch", Rows(t, (np.zeros(count, "<f4"), *np.ascontiguousarray(values.T))), "synced")


def feed_air(device: Device, stream: str, times_us: NDArray[np.int64], value: float = 1.0) -> None:
    count = len(times_us)
    with device.store.transaction() as tx:
        tx.append(stream, Rows(T0 + times_us, (np.zeros(count, "<f4"), np.full(count, value, "<f4"))), "synced")


def last_columns(device: Device) -> Mapping[str, object]:
    columns: Mapping[str, object] = msgspec.json.decode(device.messages()[-1].payload)["columns"]
    return columns


def test_rows_before_a_gap_that_fill_no_window_are_consumed_and_the_position_stays(device: Device) -> None:
    feed_weather(device, np.ones(20, np.float32), 0)
    device.feed(waves(WINDOW * 4))
    device.run_all()
    before = load_positions(device.store, "tiny")
    cursor = device.store.cursor("tiny") or 0
    feed_at(device, 3_600_000_000, WINDOW - 1)
    feed_at(device, 7_200_000_000, WINDOW - 1)
    result = device.run()
    assert result is not None
    assert (result.windows, device.store.cursor("tiny")) == (0, WINDOW * 5 - 1)
    assert cursor < WINDOW * 5 - 1
    assert load_positions(device.store, "tiny") == before != {}


def test_a_part_of_a_window_before_rows_that_cannot_be_read_is_consumed(device: Device) -> None:
    feed_weather(device, np.ones(40, np.float32), 0)
    feed_at(device, 0, WINDOW - 1)
    with device.store.transaction() as tx:
        # Of another schema: these cannot be read back.
        tx.append("watch", Rows(T0 + 1_000_000 + np.arange(5) * STEP_US, (np.zeros(5, "<f4"),)), "synced")
    feed_at(device, 2_000_000, WINDOW)
    assert sum(result.windows for result in device.run_all()) == 1


def test_more_joined_rows_within_the_age_limit_than_memory_holds_do_not_stop_the_task(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined_streams, "_MAX_ROWS", 200)
    monkeypatch.setattr(joined_streams, "_READ_ROWS", 50)
    feed_air(device, "weather", -1_900_000 + np.arange(700) * 5000)
    device.feed(waves(100))
    results = device.run_all()
    assert sum(result.windows for result in results) == 24
    assert "missing" not in last_columns(device)
    # The last window ends at 0.99 s: it took the rows at 0.98, 0.985 and 0.99 s.
    assert load_positions(device.store, "tiny")["weather"].row == 577


def test_more_joined_rows_between_periods_than_memory_holds_do_not_stop_the_task(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined_streams, "_MAX_ROWS", 200)
    monkeypatch.setattr(joined_streams, "_READ_ROWS", 50)
    assert device.task.joined is not None
    inference = device.task.inference
    spec = msgspec.structs.replace(inference.manifest.joined["weather"], period_s=0.9)
    inference.manifest = msgspec.structs.replace(inference.manifest, inputs={"weather": spec})
    times = -1_900_000 + np.arange(700) * 5000
    with device.store.transaction() as tx:
        tx.append("weather", Rows(T0 + times, (np.zeros(700, "<f4"), times.astype("<f4"))), "synced")
    t = T0 + np.arange(100) * STEP_US
    cut = features.cut_windows(t, inference.manifest.input.window)
    whole = inference.join(cut, t, {"weather": JoinedRows(times.astype(np.float32)[:, None], T0 + times)})
    done = 0
    while done < len(cut.starts):
        rest = WindowCut(cut.starts[done:], cut.consumed)
        joined = device.task.joined.reader.join(device.store, rest, t, 1, NOW)
        count = len(joined.cut.starts)
        assert count
        assert joined.cut.joined is not None
        assert whole.joined is not None
        np.testing.assert_array_equal(joined.cut.joined.values, whole.joined.values[done : done + count])
        device.task.joined.reader.confirm(joined)
        done += count


def test_a_position_holds_for_its_stream_bundle_and_row_numbers_only(device: Device) -> None:
    feed_air(device, "weather", np.arange(1000) * 300_000)
    feed_at(device, 250_000_000, 100)
    device.run_all()
    position = load_positions(device.store, "tiny")["weather"]
    assert (position.stream, position.row) == ("weather", 835)
    air = device.joined_streams["weather"].config
    device.joined_streams = {"weather": JoinedStream("roof", air, WAIT_S)}
    device.restart()
    feed_air(device, "roof", 302_000_000 + np.arange(40) * 100_000)
    feed_at(device, 302_500_000, 100)
    device.run_all()
    assert "missing" not in last_columns(device)
    assert load_positions(device.store, "tiny")["weather"].stream == "roof"
    # Row numbers begin again after damage to the store, and another bundle may look back further.
    for other in (
        msgspec.structs.replace(position, stream="roof", row=835),
        msgspec.structs.replace(position, stream="roof", row=30, bundle="sha256:other"),
    ):
        with device.store.transaction() as tx:
            tx.save_state("tiny", task_keys.JOINED_ROWS, msgspec.json.encode({"weather": other}))
        device.restart()
        t = T0 + 302_500_000 + np.arange(WINDOW) * STEP_US
        assert device.task.joined is not None
        joined = device.task.joined.reader.join(device.store, WindowCut(np.array([0]), WINDOW), t, 1)
        assert joined.cut.joined is not None
        assert joined.cut.joined.missing.tolist() == [0]


def test_a_joined_row_with_a_time_far_ahead_hides_no_later_rows(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined_streams, "_READ_ROWS", 50)
    times = np.arange(400) * 100_000
    # The last row of one read, too.
    times[[7, 49]] = 3_600_000_000
    feed_air(device, "weather", times)
    for first_us in (10_000_000, 30_000_000):
        feed_at(device, first_us, 100)
        assert sum(result.windows for result in device.run_all()) >= 24
        assert "missing" not in last_columns(device)
    # No row of a later time has come: the windows wait, whatever the row far ahead says.
    feed_at(device, 41_000_000, 100)
    assert [result.windows for result in device.run_all() if result.windows] == []


def test_windows_after_the_clock_stepped_back_get_the_rows_of_their_time(device: Device) -> None:
    feed_air(device, "weather", np.arange(1000) * 100_000)
    for first_us in (90_000_000, 30_000_000):
        feed_at(device, first_us, 100)
        assert sum(result.windows for result in device.run_all()) >= 24
        assert "missing" not in last_columns(device)
    assert load_positions(device.store, "tiny")["weather"].row < 320


def test_rows_without_a_value_are_not_read_again_for_ever(device: Device) -> None:
    feed_air(device, "weather", np.arange(100) * 100_000)
    feed_air(device, "weather", 10_000_000 + np.arange(900) * 100_000, np.nan)
    feed_at(device, 90_000_000, 100)
    device.run_all()
    assert load_positions(device.store, "tiny")["weather"].row > 900


@pytest.fixture
def runner(device: Device) -> ShadowRunner:
    """Return the shadow evaluation of the same bundle, in this process."""
    bundle = msgspec.structs.replace(device.active.bundle, digest="sha256:other")
    other = assemble_task(
        TaskPlan.from_bundle("tiny", device.task.config, device.stream, bundle, device.active.model, "sha256:c"),
        joined_streams=device.joined_streams,
    )
    return ShadowRunner(device.task, other, "better", device.store, 1)


def test_a_shadow_joins_the_windows_that_the_task_joins(device: Device, runner: ShadowRunner) -> None:
    observed: list[tuple[RowBatch, InferenceResult]] = []
    device.task.attach(Recorder(observed))
    feed_weather(device, waves(60, seed=4)[:, 0].copy(), 0)
    for _ in range(4):
        device.feed(waves(200))
        device.run_all()
    for committed in observed:
        runner.submit_batch(device.store, *committed)
    windows = sum(len(answers.cut.starts) for _, answers in observed)
    assert windows > 190
    assert (runner.stats.n, runner.stats.agreeing, runner.stats.errors) == (windows, windows, 0)


def test_a_shadow_has_no_windows_where_none_are_whole(device: Device) -> None:
    feed_weather(device, np.ones(20, np.float32), 0)
    device.feed(waves(5))
    device.feed(waves(5), pause_s=3)
    rows = device.store.read_rows("watch", device.stream.fields, 0, 100)
    assert rows is not None
    windows = shadow_windows.align_windows(device.task, device.store, rows, np.array([7, 9]))
    assert (len(windows.row), windows.model_input.shape) == (0, (0, WINDOW * len(WINDOWED) + 3))


def test_a_shadow_reads_each_joined_row_about_once(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    read, store_read = [0], device.store.read_rows

    def count_rows(stream: str, *arguments: Any) -> RowBatch | None:
        rows = store_read(stream, *arguments)
        read[0] += len(rows.t) if rows is not None and stream == "weather" else 0
        return rows

    monkeypatch.setattr(device.store, "read_rows", count_rows)
    for batch in range(5):
        feed_air(device, "weather", batch * 10**8 + np.arange(500) * 200_000)
        feed_at(device, batch * 10**8 + 99 * 10**6, 50)
        rows = store_read("watch", device.stream.fields, batch * 50, 50)
        assert rows is not None
        windows = shadow_windows.align_windows(device.task, device.store, rows, np.arange(20, 50, 4))
        # The model's input has the joined values, what an autoencoder's errors are computed from has not.
        assert (windows.model_input.shape[1], windows.values.shape[1:]) == (
            WINDOW * len(WINDOWED) + 3,
            (WINDOW, len(WINDOWED)),
        )
    assert 2500 <= read[0] < 2600


def test_a_window_waits_for_a_later_row_of_the_joined_stream_but_not_for_ever(device: Device) -> None:
    feed_weather(device, np.ones(1, np.float32), 0)
    device.feed(waves(WINDOW * 2))
    assert device.run() is None
    assert device.run(msgspec.structs.replace(NOW, boot_s=NOW.boot_s + WAIT_S - 1)) is None
    late = device.run(msgspec.structs.replace(NOW, boot_s=NOW.boot_s + WAIT_S))
    assert late is not None
    assert late.windows == 3
    # The next windows wait anew, and a row of a later time ends that.
    device.feed(waves(WINDOW))
    assert device.run(msgspec.structs.replace(NOW, boot_s=NOW.boot_s + WAIT_S)) is None
    feed_weather(device, np.ones(1, np.float32), 1)
    ready = device.run()
    assert ready is not None
    assert ready.windows == 2


def after(seconds: float) -> ClockReading:
    return msgspec.structs.replace(NOW, boot_s=NOW.boot_s + seconds)


def kill_and_reopen(device: Device, number: int) -> None:
    """Go on from the files as they are now, which the killed daemon never closed."""
    copy = device.folder.with_name(f"reopened-{number}")
    shutil.copytree(device.folder, copy)
    device.store.close()
    device.folder = copy
    device.open()


def test_a_wait_goes_on_after_the_daemon_was_killed_and_restarted(device: Device) -> None:
    feed_weather(device, np.ones(1, np.float32), 0)
    device.feed(waves(WINDOW * 2))
    # Killed and reopened more often than the wait is long: it does not begin anew.
    for seconds in range(0, 10, 3):
        assert device.run(after(seconds)) is None
        kill_and_reopen(device, seconds)
    inputs = {"weather": config.JoinedStreamConfig(stream="weather", wait=Duration(WAIT_S))}
    shown = joined_streams.to_status(device.store, "tiny", inputs)["joined"]
    assert _format_joined(shown) == [
        "joins weather: stream weather, rows 1 to 1",
        "windows up to row 16 wait for later joined rows, at most 10 s",
    ]
    assert shown["waiting_through"] == WINDOW * 2
    assert shown["streams"] == {"weather": {"stream": "weather", "row": None, "last": 1, "wait_s": WAIT_S}}
    late = device.run(after(WAIT_S))
    assert late is not None
    assert late.windows == 3
    shown = joined_streams.to_status(device.store, "tiny", inputs)["joined"]
    assert (shown["waiting_through"], shown["streams"]["weather"]["row"]) == (None, 1)
    # The wait ended with the batch's commit, so that of the next windows begins anew, also after a restart.
    device.restart()
    device.feed(waves(WINDOW))
    assert device.run(after(WAIT_S + 1)) is None
    device.restart()
    assert device.run(after(2 * WAIT_S)) is None
    assert device.run(after(2 * WAIT_S + 1)) is not None


def test_windows_that_are_ready_do_not_make_the_others_wait_anew(device: Device) -> None:
    feed_air(device, "weather", np.array([0]))
    feed_at(device, 0, WINDOW * 4)
    assert device.run(after(0)) is None
    done = []
    # A row right after the first window, then after the second: restarted in between, since the store has the wait too.
    for seconds, time_us in ((3, 75_000), (6, 115_000)):
        feed_air(device, "weather", np.array([time_us]))
        done.append(device.run(after(seconds)))
        device.restart()
    assert [result and result.windows for result in done] == [1, 1]
    assert device.run(after(WAIT_S - 0.1)) is None
    rest = device.run(after(WAIT_S))
    assert rest is not None
    assert rest.windows == 5
    assert device.store.load_state("tiny", task_keys.JOINED_WAIT) is None


def test_a_wait_reaches_no_further_than_the_windows_that_are_there(device: Device) -> None:
    feed_air(device, "weather", np.array([75_000]))
    feed_at(device, 0, WINDOW * 2)
    with device.store.transaction() as tx:
        # Row numbers began again after this was saved.
        wait = JoinedWait(10**6, device.store.uptime_s(NOW))
        tx.save_state("tiny", task_keys.JOINED_WAIT, msgspec.json.encode(wait))
    first = device.run(NOW)
    assert first is not None
    assert first.windows == 1
    stored = device.store.load_state("tiny", task_keys.JOINED_WAIT)
    assert stored is not None
    assert msgspec.json.decode(stored, type=JoinedWait).end_row == WINDOW * 2


def test_a_wait_from_a_later_uptime_begins_again(device: Device) -> None:
    feed_weather(device, np.ones(1, np.float32), 0)
    device.feed(waves(WINDOW * 2))
    with device.store.transaction() as tx:
        # The store lost its uptime.
        tx.save_state("tiny", task_keys.JOINED_WAIT, msgspec.json.encode(JoinedWait(100, 1e9)))
    assert device.run(NOW) is None
    assert device.run(after(WAIT_S)) is not None


def last_message(device: Device) -> ResultsPayload:
    return device.results()[-1]


CONFIG = f"""\
[device]
id = "pi-07"
fleet = "acme"
data_dir = "data"
[collector]
delivery = "broker"
[streams.watch]
fields = [{", ".join(f'{{ name = "{name}" }}' for name in ("extra", *WINDOWED))}]
[streams.weather]
fields = [{{ name = "other" }}, {{ name = "air" }}]
[tasks.tiny]
stream = "watch"
bundle = "tiny"
[tasks.tiny.inputs.weather]
stream = "weather"
"""


def disclosed(device: Device, body: ResultsPayload, config_text: str = CONFIG) -> Disclosure:
    """Return the rows of a message and those that it says were joined, as `outstation disclose` shows them."""
    file = device.folder.parent / "outstation.toml"
    file.write_text(config_text)
    joined = {name: each.rows for name, each in body.joined.items()}
    log = device.author.log_id
    return build_disclosure(config.load(file), device.store, device.author.secret, "tiny", log, body.rows, joined)


def with_changed_value(rows: DisclosedJoin) -> DisclosedJoin:
    columns = [[*column] for column in rows.columns]
    columns[1][0] = 0.25
    return msgspec.structs.replace(rows, columns=columns)


def test_a_message_commits_to_the_joined_rows_that_its_results_used(device: Device) -> None:
    feed_air(device, "weather", np.arange(60) * 100_000)
    device.feed(waves(200))
    device.run_all()
    device.feed(waves(200))
    device.run_all()
    first, last = device.results()[0], last_message(device)
    # The last window ends at 3.99 s and takes the rows at 3.7, 3.8 and 3.9 s.
    assert last.joined["weather"].rows[1] == 40
    for body in (first, last):
        shown = disclosed(device, body)
        assert shown.commit() == body.input
        rows = shown.joined["weather"]
        assert compare_joined("weather", rows, [body])
        assert not compare_joined("weather", with_changed_value(rows), [body])
        assert not compare_joined("other", rows, [body])
    assert not compare_joined("weather", disclosed(device, first).joined["weather"], [last])
    protected = CONFIG + '[streams.weather.privacy]\nprivate = ["air"]\n'
    with pytest.raises(UsageError, match=r"streams\.weather\.privacy: air may not leave"):
        disclosed(device, first, protected)


def test_a_late_row_is_no_joined_row(device: Device) -> None:
    feed_air(device, "weather", np.array([0, 10_000]))
    device.feed(waves(WINDOW * 2))
    assert device.run(NOW) is None
    assert device.run(after(WAIT_S)) is not None
    feed_air(device, "weather", np.array([15_000]), 9.0)
    [body] = device.results()
    assert body.joined["weather"].rows == (1, 2)
    assert compare_joined("weather", disclosed(device, body).joined["weather"], [body])


def test_too_many_joined_rows_are_named_without_a_commitment(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    for begin_us, limit, is_proven in ((0, 200, True), (10_000_000, 50, False)):
        # Two fields and the time of some 35 rows.
        monkeypatch.setattr(joined_streams, "_MAX_COMMITTED_VALUES", limit)
        feed_air(device, "weather", begin_us + np.arange(60) * 10_000)
        feed_at(device, begin_us, 40)
        device.run_all()
        body = last_message(device)
        assert bool(body.joined["weather"].input) == is_proven
        compared = compare_joined("weather", disclosed(device, body).joined["weather"], [body])
        assert compared is (True if is_proven else None)
