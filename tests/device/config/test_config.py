"""Device config: every key loads, and an error names the file, the key and the fix."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outstation.__main__ import main
from outstation.device import config
from outstation.device.bootstrap.tasks import trusted_publishers
from outstation.device.config import sources
from outstation.device.config.config import Config
from outstation.device.config.sources import FilesSource, HostSource, ReplaySource, SocketSource
from outstation.device.config.updates import UpdatesConfig
from outstation.foundation import input_files
from outstation.foundation.day_window import DayWindow
from outstation.foundation.errors import ConfigError
from outstation.protocol.wire.keys import b64url_encode

KEY = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"
EXAMPLE = f"""
[device]
id = "pi-07"                 # a-z 0-9 - _ . , 1-64 characters
fleet = "acme"
data_dir = "/var/lib/outstation"

[broker]
url = "mqtts://broker:8883"  # mqtt:// is refused outside loopback unless allow_plaintext = true
ca_file = "ca.pem"
cert_file = "device.crt"
tls_key_file = "device-tls.key"
max_message_bytes = 120_000  # AWS IoT Core's limit less a margin

[collector]
key = "{KEY}"                # base64url Ed25519 public key that signs acknowledgements
delivery = "collector"       # delete on the collector's acknowledgement; "broker": on PUBACK

[operators]
keys = ["{KEY}"]             # public keys allowed to sign commands and desired state

[buffer]
max_size = "1 GiB"
commit_every = "1 s"         # the longest a producer waits for its acknowledgement
keep_readings = "24 h"       # after use; sooner when space is short

[streams.watch]
fields = [{{ name = "ax", unit = "g", min = -16, max = 16 }}, {{ name = "mode", type = "category", optional = true }}]
source = {{ kind = "socket" }} # socket | mqtt | files | host | replay

[tasks.exercise]
stream = "watch"
bundle = "exercise"          # name in the bundle store, or a path
schedule = "every 60 s"      # "every …", a cron expression, or "when 500 rows"
publish = "all"              # all | changes | summary, or {{ below_score = 0.6 }}
"""
DEVICE = '[device]\nid = "pi-07"\nfleet = "acme"\n'
MADE = "[streams.a]\nsource = {{ kind = 'files', folder = 'in', {} }}\n"
SOUND = "{ rate = 16000, window = 1024, hop = 512, mels = 8 }"
STREAM = '[streams.watch]\nfields = [{ name = "ax" }]\n'
TASK = '[tasks.exercise]\nstream = "watch"\nbundle = "exercise"\n'


def load(folder: Path, text: str) -> Config:
    file = folder / "outstation.toml"
    file.write_text(text, encoding="utf-8")
    return config.load(file)


def mistake(folder: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    assert str(caught.value).startswith(f"{folder / 'outstation.toml'}: ")
    assert "\n" not in str(caught.value)
    return caught.value


def test_the_example_config(tmp_path: Path) -> None:
    conf = load(tmp_path, EXAMPLE)
    assert conf.device == config.DeviceConfig(id="pi-07", fleet="acme", data_dir="/var/lib/outstation")
    assert conf.data_dir == Path("/var/lib/outstation")
    assert (conf.broker.host, conf.broker.port, conf.broker.tls) == ("broker", 8883, True)
    assert conf.broker.ca_file == str(tmp_path / "ca.pem")
    assert conf.broker.cert_file == str(tmp_path / "device.crt")
    assert conf.broker.tls_key_file == str(tmp_path / "device-tls.key")
    assert conf.broker.max_message_bytes == 120_000
    assert conf.collector == config.CollectorConfig(key=KEY, delivery="collector")
    assert conf.operators.keys == [KEY]
    assert conf.buffer == config.BufferConfig(
        max_size=config.Size(2**30), commit_every=config.Duration(1), keep_readings=config.Duration(86_400)
    )
    ax, mode = conf.streams["watch"].fields
    assert (ax.name, ax.unit, ax.min, ax.max, ax.type, ax.optional) == ("ax", "g", -16, 16, "f32", False)
    assert (mode.type, mode.optional) == ("category", True)
    assert conf.streams["watch"].source == SocketSource()
    task = conf.tasks["exercise"]
    assert (task.stream, task.bundle, task.schedule, task.publish) == ("watch", "exercise", "every 60 s", "all")


def test_keys_left_out_have_their_defaults(tmp_path: Path) -> None:
    conf, example = load(tmp_path, DEVICE + STREAM + TASK), load(tmp_path, EXAMPLE)
    assert conf.buffer == example.buffer
    assert conf.collector.delivery == "collector"
    assert conf.broker.max_message_bytes == 120_000
    assert conf.streams["watch"].source == SocketSource()
    assert conf.tasks["exercise"] == example.tasks["exercise"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('{ kind = "socket" }', SocketSource()),
        ('{ kind = "files", folder = "in" }', FilesSource(folder="{base}/in")),
        (
            '{ kind = "files", folder = "/in", poll_interval = "500 ms" }',
            FilesSource(folder="/in", poll_interval=config.Duration(0.5)),
        ),
        ('{ kind = "host", poll_interval = "1 min" }', HostSource(poll_interval=config.Duration(60))),
        (
            '{ kind = "replay", file = "x.npz", subject = 3, speed = 2.5, seed = 7, rows = 9, '
            'faults = [{ kind = "gain", fields = ["ax"], from_row = 5, amount = 0.5 }] }',
            ReplaySource(
                file="{base}/x.npz",
                subject=3,
                speed=2.5,
                seed=7,
                rows=9,
                faults=[sources.ReplayFault(kind="gain", fields=["ax"], from_row=5, amount=0.5)],
            ),
        ),
    ],
)
def test_every_source_loads_with_absolute_paths(tmp_path: Path, source: str, expected: Any) -> None:
    got = load(tmp_path, DEVICE + STREAM + f"source = {source}\n").streams["watch"].source
    assert repr(got) == repr(expected).replace("{base}", str(tmp_path))


@pytest.mark.parametrize("schedule", ["every 60 s", "*/5 * * * *", "when 500 rows"])
@pytest.mark.parametrize("publish", ['"all"', '"changes"', '"summary"', "{ below_score = 0.6 }"])
def test_every_schedule_and_publish_policy_loads(tmp_path: Path, schedule: str, publish: str) -> None:
    task = load(tmp_path, DEVICE + STREAM + TASK + f'schedule = "{schedule}"\npublish = {publish}\n').tasks["exercise"]
    assert task.schedule == schedule
    assert task.publish == (config.PublishBelow(below_score=0.6) if "below" in publish else publish.strip('"'))


def test_a_bundle_with_a_slash_is_a_path(tmp_path: Path) -> None:
    for written, meant in (("exercise", "exercise"), ("./exercise", str(tmp_path / "exercise")), ("/b/x", "/b/x")):
        text = DEVICE + STREAM + TASK.replace('"exercise"', f'"{written}"')
        assert load(tmp_path, text).tasks["exercise"].bundle == meant


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ('[borker]\nurl = "x"', "borker", "unknown key; did you mean 'broker'?"),
        ('[broker]\nulr = "x"', "broker.ulr", "unknown key; did you mean 'url'?"),
        ('[buffer]\nmaxsize = "1 GiB"', "buffer.maxsize", "unknown key; did you mean 'max_size'?"),
        ('[collector]\nkeys = ["x"]', "collector.keys", "unknown key; did you mean 'key'?"),
        ("[operators]\nzzz = 1", "operators.zzz", "unknown key; there is deployers, keys, reporters, wipe_delay"),
        ('[publishers]\nkey = "x"', "publishers.key", "unknown key; did you mean 'keys'?"),
        ('[intake]\ntpc = "x"', "intake.tpc", "unknown key; did you mean 'tcp'?"),
        (STREAM + "sources = 1", "streams.watch.sources", "unknown key; did you mean 'source'?"),
        (STREAM + "[streams.b]\nfields = [{ nmae = 'x' }]", "streams.b.fields[0].nmae", "did you mean 'name'?"),
        (STREAM + "[streams.b]\nfields = [{ name = 'x', unti = 'g' }]", "streams.b.fields[0].unti", "mean 'unit'?"),
        (STREAM + 'source = { kind = "files", foldr = "x" }', "streams.watch.source.foldr", "did you mean 'folder'?"),
        (
            STREAM + 'source = { kind = "host", pol_interval = "1 s" }',
            "streams.watch.source.pol_interval",
            "did you mean 'poll_interval'?",
        ),
        (
            STREAM + 'source = { kind = "replay", file = "x", faults = [{ kidn = "gain" }] }',
            "streams.watch.source.faults[0].kidn",
            "did you mean 'kind'?",
        ),
        (STREAM + TASK + 'shedule = "every 1 s"', "tasks.exercise.shedule", "did you mean 'schedule'?"),
        (STREAM + TASK + "publish = { bellow = 1 }", "tasks.exercise.publish.bellow", "did you mean 'below_score'?"),
        (STREAM + TASK + "slices = [{ feild = 'ax', edges = [0] }]", "tasks.exercise.slices[0].feild", "mean 'field'?"),
        ("[task.exercise]\nstream = 'x'", "task", "unknown key; did you mean 'tasks'?"),
    ],
)
def test_an_unknown_key_is_named_with_a_suggestion(tmp_path: Path, text: str, key: str, message: str) -> None:
    error = mistake(tmp_path, DEVICE + text)
    assert error.key == key
    assert message in error.problem
    assert error.problem.startswith("unknown key")


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ('[buffer]\nmax_size = "1 GIGA"', "buffer.max_size", "'1 GIGA' must be a number with a unit: B, KB"),
        ("[buffer]\nmax_size = 1_000_000", "buffer.max_size", "1000000 must be a number with a unit"),
        ('[buffer]\nmax_size = "1000"', "buffer.max_size", "'1000' must be a number with a unit"),
        ('[buffer]\nmax_size = "-1 GiB"', "buffer.max_size", "must be a number with a unit"),
        ('[buffer]\nmax_size = "100 KiB"', "buffer.max_size", "use at least 1 MiB"),
        ('[buffer]\ncommit_every = "1 sec"', "buffer.commit_every", "'1 sec' must be a number with a unit: ms, s, min"),
        ('[buffer]\nkeep_messages = "4000 d"', "buffer.keep_messages", "between 0 s and 3650 d"),
        ('[buffer]\nkeep_readings = "1 GiB"', "buffer.keep_readings", "must be a number with a unit"),
        ('[broker]\nurl = "broker"', "broker.url", "'broker' is not mqtt://HOST[:PORT] or mqtts://HOST[:PORT]"),
        ('[broker]\nurl = "http://broker"', "broker.url", "is not mqtt://"),
        ('[broker]\nurl = "mqtts://broker:x"', "broker.url", "is not mqtt://"),
        ('[broker]\nurl = "mqtts://"', "broker.url", "is not mqtt://"),
        (
            '[broker]\nurl = "mqtt://broker"',
            "broker.url",
            "is not encrypted; use mqtts://, or set allow_plaintext",
        ),
        ('[broker]\nurl = "mqtts://b"\ncert_file = "x"', "broker.cert_file", "belong together; set both or neither"),
        ("[broker]\nmax_message_bytes = 10", "broker.max_message_bytes", "must be at least 2000"),
        ('[broker]\nmax_message_bytes = "120 KB"', "broker.max_message_bytes", "must be a whole number, not a text"),
        (
            '[collector]\ndelivery = "brocker"',
            "collector.delivery",
            "'brocker' is not a valid choice; did you mean 'broker'?",
        ),
        ('[intake]\ntcp = "0.0.0.0:7071"', "intake.tcp", "must be a loopback address"),
        ('[intake]\ntcp = "127.0.0.1"', "intake.tcp", "must be a loopback address"),
        ('[intake]\ntcp = "127.0.0.1:70710"', "intake.tcp", "must be a loopback address"),
        ("[streams]\nwatch = 3", "streams.watch", "a section has a name of its own: [streams.NAME]"),
        ("[streams.watch]\nsource = { kind = 'socket' }", "streams.watch.fields", "this key is required; add it"),
        ("[streams.watch]\nfields = []", "streams.watch.fields", "must have at least 1 entry"),
        (
            MADE.format("image = { width = 9, height = 9 }, sound = " + SOUND),
            "streams.a.source",
            "has both image and sound",
        ),
        (
            MADE.format("image = { width = 9, height = 9 }") + "fields = [{ name = 'x' }]",
            "streams.a.fields",
            "are defined by the source's image or sound; remove them",
        ),
        (
            MADE.format("image = { width = 9, height = 9, scale = nan }"),
            "streams.a.source.image.scale",
            "is nan; give a finite number",
        ),
        (MADE.format("image = { width = 9 }"), "streams.a.source.image.height", "this key is required; add it"),
        (MADE.format("image = { width = 9, hieght = 9 }"), "streams.a.source.image.hieght", "did you mean 'height'?"),
        (MADE.format("sound = " + SOUND.replace("8 }", "8, low = 9000 }")), "streams.a.source.sound", "within half"),
        (
            "[streams.watch]\nfields = ['ax']",
            "streams.watch.fields[0]",
            "must be a table",
        ),
        ("[streams.Watch]\nfields = [{ name = 'ax' }]", "streams.Watch", "'Watch' must be 1-64 of a-z 0-9 . _ -"),
        ("[streams.watch]\nfields = [{ name = 'a x' }]", "streams.watch.fields", "'a x' is not a valid field name"),
        (
            "[streams.watch]\nfields = [{ name = 'output.x' }]",
            "streams.watch.fields",
            "field 'output.x': alerts about outputs",
        ),
        ("[streams.watch]\nfields = [{ name = 't' }]", "streams.watch.fields", "'t' is not a valid field name"),
        ("[streams.watch]\nfields = [{ name = 'a' }, { name = 'a' }]", "streams.watch.fields", "duplicate field"),
        (
            "[streams.watch]\nfields = [{ name = 'a', min = 2, max = 1 }]",
            "streams.watch.fields",
            "min 2 is above max 1",
        ),
        (
            "[streams.watch]\nfields = [{ name = 'a', max = inf }]",
            "streams.watch.fields[0].max",
            "is inf; give a finite number",
        ),
        (
            "[streams.watch]\nfields = [{ name = 'a', type = 'f16' }]",
            "streams.watch.fields[0].type",
            "not a valid choice",
        ),
        (
            "[streams.watch]\nfields = [{ name = 'a', type = 'category', max = 1 }]",
            "streams.watch.fields",
            "no min and max",
        ),
        (
            "[streams.watch]\nfields = [{ name = 'a', type = 'i64', optional = true }]",
            "streams.watch.fields",
            "type i64 cannot be optional",
        ),
        (
            STREAM + "source = { kind = 'serial' }",
            "streams.watch.source.kind",
            "files, host, mqtt, replay, socket",
        ),
        (STREAM + "source = { folder = 'x' }", "streams.watch.source.kind", "this key is required; add it"),
        *(
            (STREAM + f"source = {{ kind = 'files', folder = '{folder}' }}", "streams.watch.source.folder", "contains")
            for folder in ("", ".", "..", "in/..", "/", "/var/lib/outstation")
        ),
        (STREAM + 'source = { kind = "files", folder = "a\\u0000b" }', "streams.watch.source.folder", "a NUL"),
        ('[intake]\ntoken_file = "a\\u0000b"', "intake.token_file", "holds a NUL character"),
        (STREAM + "source = { kind = 'files' }", "streams.watch.source.folder", "this key is required; add it"),
        (
            STREAM + "source = { kind = 'host', poll_interval = '0 s' }",
            "streams.watch.source.poll_interval",
            "at least 10 ms",
        ),
        (
            STREAM + "source = { kind = 'host', poll_interval = '5' }",
            "streams.watch.source.poll_interval",
            "a number with a unit",
        ),
        (
            STREAM
            + "source = { kind = 'replay', file = 'x', faults = [{ kind = 'stuck', fields = ['az'], from_row = 1 }] }",
            "streams.watch.source.faults[0].fields",
            "no field 'az'; did you mean 'ax'?",
        ),
        (
            STREAM
            + "source = { kind = 'replay', file = 'x', faults = [{ kind = 'swap', fields = ['ax'], from_row = 1 }] }",
            "streams.watch.source.faults[0].fields",
            "swap needs two fields, not 1",
        ),
        (
            STREAM + "source = { kind = 'replay', file = 'x', faults = "
            "[{ kind = 'quantize', fields = ['ax'], from_row = 1 }] }",
            "streams.watch.source.faults[0].amount",
            "quantize needs an amount above 0",
        ),
        (
            STREAM
            + "source = { kind = 'replay', file = 'x', faults = [{ kind = 'gain', fields = ['ax'], from_row = 1 }] }",
            "streams.watch.source.faults[0].amount",
            "gain without amount changes nothing; give an amount",
        ),
        (
            STREAM + "source = { kind = 'replay', file = 'x', faults = "
            "[{ kind = 'offset', fields = ['ax'], from_row = 1, amount = 0 }] }",
            "streams.watch.source.faults[0].amount",
            "offset by 0 changes nothing; give an amount",
        ),
        (
            STREAM + "source = { kind = 'replay', file = 'x', speed = 0 }",
            "streams.watch.source.speed",
            "above 0",
        ),
        (
            STREAM + TASK.replace("watch", "wacth"),
            "tasks.exercise.stream",
            "unknown stream 'wacth'; did you mean 'watch'?",
        ),
        (
            TASK,
            "tasks.exercise.stream",
            "unknown stream 'watch'; the config has no stream; add a section [streams.NAME]",
        ),
        (STREAM + "[tasks.a]\nstream = 'watch'", "tasks.a.bundle", "this key is required; add it"),
        (
            STREAM + "[tasks.pump]\nstream = 'watch'\nbundle = 'x'\n[[tasks.pmp.alerts]]\nname = 'a'\nlabel = 'b'",
            "tasks.pmp.stream",
            "this key is required; add it; did you mean 'pump'?",
        ),
        (STREAM + TASK.replace("exercise]", "Exercise]"), "tasks.Exercise", "must be 1-64 of a-z 0-9"),
        (STREAM + TASK + "publish = 'al'", "tasks.exercise.publish", "'al' is not a valid choice; did you mean 'all'?"),
        (STREAM + TASK + 'deadline = "0 s"', "tasks.exercise.deadline", "must be positive"),
        (STREAM + TASK + "deadline = 2", "tasks.exercise.deadline", "must be a number with a unit"),
        (STREAM + TASK + "learn_windows = 5", "tasks.exercise.learn_windows", "must be at least 20"),
        ('[homeassistant]\nprefix = "a b"', "homeassistant.prefix", "must match the regular expression ^[A-Za-z0-9_-]"),
        (STREAM + "privacy = { round = { ay = 1, ax = 'x' } }", "streams.watch.privacy.round.ax", "must be a number"),
        (STREAM + TASK + "inputs = { a = { stream = 'watch' }, b = 1 }", "tasks.exercise.inputs.b", "must be a table"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_the_fix(tmp_path: Path, text: str, key: str, message: str) -> None:
    error = mistake(tmp_path, DEVICE + text)
    assert error.key == key
    assert message in error.problem


@pytest.mark.parametrize("name", ["", "Pi", "pi 07", "pi/07", "pi+", "#", "-pi", ".pi", "p" * 65, "pí"])
def test_an_invalid_device_or_fleet_name_is_refused(tmp_path: Path, name: str) -> None:
    assert mistake(tmp_path, f'[device]\nid = "{name}"\nfleet = "acme"\n').key == "device.id"
    assert mistake(tmp_path, f'[device]\nid = "pi"\nfleet = "{name}"\n').key == "device.fleet"


@pytest.mark.parametrize("url", ["mqtt://localhost", "mqtt://127.0.0.1:1884", "mqtt://[::1]:1883", "mqtts://broker"])
def test_a_broker_on_this_machine_or_behind_tls_is_allowed(tmp_path: Path, url: str) -> None:
    assert load(tmp_path, DEVICE + f'[broker]\nurl = "{url}"\n').broker.url == url


def test_sending_in_the_clear_can_be_allowed_by_hand(tmp_path: Path) -> None:
    text = DEVICE + '[broker]\nurl = "mqtt://broker"\nallow_plaintext = true\n'
    assert load(tmp_path, text).broker.port == 1883


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such file; `outstation init` writes one"):
        config.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        config.load(tmp_path)
    secret = mistake(tmp_path, '[broker]\npassword = "hunter2\n')
    assert "line 2" in secret.problem
    assert "`password`" in secret.problem
    assert "hunter2" not in secret.problem
    assert "not valid TOML" in str(mistake(tmp_path, "[device\n"))
    assert "byte order mark" in str(mistake(tmp_path, "\ufeff[device]\n"))
    (tmp_path / "outstation.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        config.load(tmp_path / "outstation.toml")


def test_a_wrong_config_is_one_line_on_stderr_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "outstation.toml"
    file.write_text(DEVICE + STREAM + TASK.replace("watch", "wacth"))
    for command in ("check", "status", "run", "batch"):
        with pytest.raises(SystemExit) as ended:
            main([command, "-c", str(file)])
        assert ended.value.code == 2
        message = capsys.readouterr()
        assert message.out == ""
        assert message.err == (
            f"outstation: {file}: tasks.exercise.stream: unknown stream 'wacth'; did you mean 'watch'?\n"
        )


@pytest.mark.parametrize(
    ("text", "size"),
    [("5 B", 5), ("1 KB", 1000), ("1.5 KiB", 1536), ("2MiB", 2**21), ("1 gib", 2**30), (" 1 GB ", 10**9)],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert config.parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("250 ms", 0.25), ("10 s", 10), ("1.5 min", 90), ("72 h", 259_200), ("2d", 172_800)),
        *(("2 h 40 min", 9600), ("2 h 05 min", 7500), ("1 d 2 h 3 min 4 s", 93_784)),
    ],
)
def test_durations_have_units(text: str, seconds: float) -> None:
    assert config.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s",
        "10",
        "10 x",
        "1e3 s",
        "-1 s",
        "1 s 2",
        "40 min 2 h",
        "1 h 1 h",
        "1 h min",
        "1h30min",
        "nan s",
        "inf h",
        "1,5 s",
    ],
)
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a number with a unit"):
        config.parse_duration(text)


def test_the_search_order_of_config_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUTSTATION_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    assert input_files.find_config(None) == Path("/etc/outstation/outstation.toml")
    (tmp_path / "outstation.toml").touch()
    assert input_files.find_config(None) == Path("outstation.toml")
    monkeypatch.setenv("OUTSTATION_CONFIG", "/env.toml")
    assert input_files.find_config(None) == Path("/env.toml")
    assert input_files.find_config("/given.toml") == Path("/given.toml")


def test_the_help_lists_all_config_locations(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["status", "--help"])
    message = " ".join(capsys.readouterr().out.split())
    assert "default $OUTSTATION_CONFIG, ./outstation.toml, /etc/outstation/outstation.toml." in message


def test_the_digest_ignores_the_brokers_password(tmp_path: Path) -> None:
    base = DEVICE + STREAM + TASK
    digest = config.digest(load(tmp_path, base))
    assert digest.startswith("sha256:")
    assert config.digest(load(tmp_path, base + "# a comment\n")) == digest
    assert config.digest(load(tmp_path, base + '[broker]\npassword = "secret"\n')) == digest
    assert config.digest(load(tmp_path, base + "learn_windows = 50\n")) != digest


TOML = st.lists(
    st.sampled_from(
        [*EXAMPLE.splitlines(), "[device]", "id = 1", "[[streams]]", "a.b.c = {}", "= 1", '"' * 3, "x = nan"]
    )
    | st.text(max_size=30),
    max_size=40,
).map("\n".join)


@given(TOML)
@example("a = " + "[" * 100_000)
@example("a." * 5_000 + "b = 1")
@example(DEVICE + "[buffer]\nmax_size = '" + "9" * 400 + " GiB'\n")
@example(DEVICE + "[buffer]\ncommit_every = '" + "9" * 400 + " d'\n")
@example(DEVICE + STREAM.replace('"ax"', '"ax", min = -inf'))
def test_any_text_loads_or_raises_an_error_with_the_file(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outstation.toml"
        file.write_bytes(text.encode(errors="surrogatepass"))
        try:
            assert config.digest(config.load(file)).startswith("sha256:")
        except ConfigError as mistake:
            message = str(mistake)
        else:
            return
    assert message.startswith(f"{file}: ")


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "x = " + "{a = " * 5_000])
def test_a_deeply_nested_config_is_refused(tmp_path: Path, text: str) -> None:
    assert "nested too deep" in str(mistake(tmp_path, text))


@pytest.mark.parametrize("key", [b64url_encode(bytes(32)), b64url_encode((1).to_bytes(32, "little"))])
def test_small_order_keys_in_a_config_are_refused(tmp_path: Path, key: str) -> None:
    file = tmp_path / "outstation.toml"
    file.write_text(DEVICE + f'[publishers]\nkeys = ["{KEY}", "{key}"]\n')
    with pytest.raises(ConfigError, match=r"outstation\.toml: publishers\.keys: .* of small order"):
        trusted_publishers(file, config.load(file), None)


UPDATES = '[updates]\nurl = "https://updates.example.org/acme"\n'


def test_updates_from_a_server_or_a_folder(tmp_path: Path) -> None:
    base = DEVICE + STREAM
    assert load(tmp_path, base).updates is None
    plain = load(tmp_path, base + UPDATES.replace("acme", "acme/")).updates
    assert plain == UpdatesConfig(url="https://updates.example.org/acme", root=str(tmp_path / "root.json"))
    assert (float(plain.poll_interval), int(plain.max_size)) == (6 * 3600, 64 << 20)
    assert plain.day_window is None
    every = (
        'ca_file = "ca.pem"\nroot = "/r.json"\npoll_interval = "1 h"\nwindow = "22:30-05:00"\nmax_rate = "512 KiB"\n'
    )
    loaded = load(tmp_path, base + UPDATES + every + 'max_size = "8 MiB"\n').updates
    assert loaded is not None
    assert (loaded.ca_file, loaded.root) == (str(tmp_path / "ca.pem"), "/r.json")
    assert loaded.day_window == DayWindow(22 * 60 + 30, 5 * 60)
    assert (float(loaded.poll_interval), loaded.max_rate, int(loaded.max_size)) == (
        3600,
        config.Size(512 << 10),
        8 << 20,
    )
    folder = load(tmp_path, base + '[updates]\nurl = "stick/acme"\n').updates
    assert folder is not None
    assert folder.is_folder
    assert folder.url == str(tmp_path / "stick" / "acme")


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        ('url = "http://updates.example.org"', "url", "is not encrypted"),
        ('url = "ftp://updates.example.org"', "url", "is neither https"),
        ('url = "https://"', "url", "is neither https"),
        ('url = "https://user:secret@host/"', "url", "is neither https"),
        ('url = "https://host:x/"', "url", "is neither https"),
        ('url = "https://host/?a=b"', "url", "is neither https"),
        ('url = ""', "url", "is empty"),
        ('url = "https://h"\nwindow = "1:00-5:00"', "window", "is not a time range"),
        ('url = "https://h"\nwindow = "01:00-24:00"', "window", "is not a time range"),
        ('url = "https://h"\nwindow = "01:00-01:00"', "window", "is not a time range"),
        ('url = "https://h"\npoll_interval = "1 s"', "poll_interval", "between 60 s and 30 d"),
        ('url = "https://h"\nmax_rate = "1 B"', "max_rate", "must be at least 1024 B"),
        ('url = "https://h"\nmax_size = "0 B"', "max_size", "at most 256 MiB"),
        ('url = "https://h"\nmax_size = "1 GiB"', "max_size", "at most 256 MiB"),
        ('url = "https://h"\nmax_rat = "1 MiB"', "max_rat", "did you mean 'max_rate'?"),
    ],
)
def test_invalid_updates_are_named(tmp_path: Path, text: str, key: str, problem: str) -> None:
    loaded = mistake(tmp_path, DEVICE + STREAM + f"[updates]\n{text}\n")
    assert loaded.key == f"updates.{key}"
    assert problem in loaded.problem


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080/acme", "http://localhost", "http://[::1]:80/x"])
def test_unencrypted_updates_need_loopback_or_permission(tmp_path: Path, url: str) -> None:
    assert load(tmp_path, DEVICE + STREAM + f'[updates]\nurl = "{url}"\n').updates is not None
    allowed = '[updates]\nurl = "http://updates.example.org"\nallow_plaintext = true\n'
    assert load(tmp_path, DEVICE + STREAM + allowed).updates is not None


def test_where_updates_come_from_decides_no_result(tmp_path: Path) -> None:
    base = DEVICE + STREAM + TASK
    assert config.digest(load(tmp_path, base + UPDATES)) == config.digest(load(tmp_path, base))


@pytest.mark.parametrize("group", ["_all", "Roof", "a/b", ""])
def test_an_invalid_group_name_is_refused(tmp_path: Path, group: str) -> None:
    file = tmp_path / "outstation.toml"
    file.write_text(f'[device]\nid = "pi-07"\nfleet = "acme"\ngroups = ["roof", "{group}"]\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"device\.groups"):
        config.load(file)


@pytest.mark.parametrize("url", ["mqtts://user:s3cret@broker:8883", "mqtt://u:s3c/ret@broker", "http://u:s3cret@x"])
def test_a_password_in_the_brokers_url_is_refused_and_never_shown(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, f'[device]\nid = "pi-07"\nfleet = "acme"\n[broker]\nurl = "{url}"')
    assert "holds credentials" in str(refused.value)
    assert "ret" not in str(refused.value)
