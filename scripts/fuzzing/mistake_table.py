"""Mistakes that people make in their first hours: commands, configs and files, with what the answer must say.

A row is a command, its exit code, and words of the answer: what is wrong (file, key or value), then what to do.
Words in braces are files of the site of `scripts.fuzzing.site`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_HERE = " -c {device/outstation.toml}"
_FLEET = " --dir {fleet}"


@dataclass(frozen=True, slots=True)
class Mistake:
    """`append` is added to the device's config, where the first of `swap` is replaced by the second."""

    command: str
    code: int
    names: tuple[str, ...]
    remedy: str
    append: str = ""
    swap: tuple[str, str] = ("", "")
    files: dict[str, str] = field(default_factory=dict)


def _config(names: str, remedy: str, append: str = "", swap: tuple[str, str] = ("", ""), code: int = 2) -> Mistake:
    """Return a mistake in the device's config; `names` is the key and what is wrong with it."""
    named = ("outstation.toml", *names.split(" / "))
    return Mistake("check --config-only" + _HERE, code, named, remedy, append, swap)


def _rows(text: str, names: str, remedy: str, *, code: int = 1, options: str = "", name: str = "f.csv") -> Mistake:
    """Return a mistake in a file of readings."""
    command = f"ingest watch {{{name}}}{options}{_HERE}"
    return Mistake(command, code, tuple(names.split(" / ")), remedy, files={name: text})


def _device(command: str, names: str, remedy: str, code: int = 2) -> Mistake:
    return Mistake(command + _HERE, code, tuple(names.split(" / ")), remedy)


def _fleet(command: str, names: str, remedy: str, code: int = 2, **files: str) -> Mistake:
    named = {name.replace("_", "."): text for name, text in files.items()}
    return Mistake("fleet " + command + _FLEET, code, tuple(names.split(" / ")), remedy, files=named)


def _bare(command: str, names: str, remedy: str, code: int = 2, **files: str) -> Mistake:
    named = {name.replace("_", "."): text for name, text in files.items()}
    return Mistake(command, code, tuple(names.split(" / ")), remedy, files=named)


def _stream(rest: str, fields: str = '[{ name = "a" }]') -> str:
    return f"[streams.x]\nfields = {fields}\n{rest}\n"


_SIX = "ax,ay,az,wx,wy,wz"
_SPEC = (
    'name = "p"\nversion = "1.0.0"\nkind = "classify"\nmodel = "bundle/model.tflite"\n'
    '[input]\nfields = ["ax", "ay", "az", "wx", "wy", "wz"]\n'
)
_PLAN = '[rollout]\nname = "r"\ntask = "exercise"\nbundle = "exercise"\nversion = "9.9.9"\ntarget = "all"\n'

WORDS = (
    _bare("staus", "staus", "did you mean 'status'"),
    _bare("streem", "streem", "outstation --help"),
    _bare("-c x status", "-c", "follow the command"),
    _bare("devices", "devices", "`outstation fleet devices`"),
    _bare("pack x", "pack", "`outstation model pack`"),
    _bare("fleet enroll pi-1", "enroll", "did you mean 'enrol'"),
    _bare("status --josn", "--josn", "--json"),
    _bare("fleet device", "device", "did you mean 'devices'"),
    _bare("drift" + _HERE, "TASK", "--help"),
    _bare("model run exercise {rows.csv}", "--out", "--help"),
    _bare("fleet simulate --devices 0", "--devices / 0", "1<=x<="),
    _bare("demo --duration 5", "--duration / 5", "x>=15"),
    _bare("demo --scenario foo", "--scenario / foo", "exercise"),
    _bare("status extra" + _HERE, "extra", "--help"),
    _bare("results exercise --last many" + _HERE, "--last / many", "--help"),
    _bare("check --config {device/outstation.toml} --config-only --verbose", "--verbose", "--help"),
)
FOLDERS = (
    _bare("init /proc/x", "/proc/x", "folder"),
    _bare("init {device}", "outstation.toml", "move"),
    Mistake("init {e1} --id Pi@07", 2, ("--id", "Pi@07"), "a-z 0-9"),
    Mistake("init {e1} --id Pi-07", 2, ("--id", "Pi-07"), "a-z 0-9"),
    _bare("join {rows.csv} --dir {e2}", "rows.csv", "outstation fleet enrol"),
    _bare("join {nothing.tar.gz} --dir {e2}", "nothing.tar.gz", "outstation fleet enrol"),
    _bare("check -c {none.toml}", "none.toml", "outstation init"),
    _bare("check -c {device}", "device", "name a file"),
    _bare("check -c {device/device.key}", "device.key / line 1", "KEY = VALUE"),
    _bare("init {rows.csv}", "rows.csv", "another folder"),
    _bare("init {e3} --from {none.csv}", "none.csv", "check the name"),
    _bare("init {e3} --from mqtt://127.0.0.1:1 --topic garden/#", "127.0.0.1:1", "start the broker"),
    _bare("init {e3} --from mqtt://127.0.0.1:1", "--topic", "--topic"),
    _bare("request {e4} --fleet Acme --id pi-09 --out {out.json}", "Acme", "a-z 0-9"),
)
CONFIG = (
    _config("not valid TOML / line / [streams.watch]", "keep one", "[streams.watch]\nfields = []\n"),
    _config("line / fields", "quote", "[streams.x]\nfields = [{ name = a }]\n"),
    _config("device.nam / unknown key", "there is data_dir, fleet, groups, id", swap=('id = "pi-07"', 'nam = "pi-07"')),
    _config("device.id / required", "add", swap=('id = "pi-07" ', "# ")),
    _config("buffer.max_size / 1", '"512 MiB"', swap=('"1 GiB"', "1")),
    _config("buffer.max_size / '1'", '"512 MiB"', swap=('"1 GiB"', '"1"')),
    _config("buffer.max_size / 1 PB", "GiB", swap=('"1 GiB"', '"1 PB"')),
    _config("tasks.exercise.schedule / every 10", '"every 60 s"', 'schedule = "every 10"\n'),
    _config("tasks.exercise.schedule / 61 * * * * / maximum value (59)", "cron", 'schedule = "61 * * * *"\n'),
    _config("tasks.exercise.schedule / hourly", "every", 'schedule = "hourly"\n'),
    _config("tasks.exercise.publish / none", "summary", 'publish = "none"\n'),
    _config("tasks.y.stream / wach", "did you mean 'watch'", '[tasks.y]\nstream = "wach"\nbundle = "exercise"\n'),
    _config("line / >", "remove the `>`", "> [streams.x]\n"),
    _config("slices / must be a list / a text", "such as", 'slices = "mode"\n'),
    _config("not valid TOML", "curly quotes", swap=('"pi-07"', "“pi-07”")),
    _config("`max_size`", "KEY = VALUE", swap=('max_size = "1 GiB"', "max_size: 1 GiB")),
    _config("[broker", "close the bracket", swap=("[broker]", "[broker")),
    _config("streams.fields", "[streams.NAME]", swap=("[streams.watch]", "[streams]")),
    _config("streams.x / paths", "field", _stream('source = { kind = "mqtt", topic = "a", paths = { b = "x" } }')),
    _config("retention / unknown key", "there is", "[retention]\nkeep = 1\n"),
    _config("streams.x.fields[0].type / float", "f32", _stream("", '[{ name = "a", type = "float" }]')),
    _config("streams.x.source.kind / mqqt", "did you mean 'mqtt'", _stream('source = { kind = "mqqt", topic = "a" }')),
    _config("streams.x.source.topic / required", "add", _stream('source = { kind = "mqtt" }')),
    _config("streams.x.source.topic / a/#/b", "#", _stream('source = { kind = "mqtt", topic = "a/#/b" }')),
    _config("streams.x.fields[0] / a", "{ name = ", _stream("", '["a", "b"]')),
    _config("streams.x.fields / duplicate field 'a'", "remove", _stream("", '[{ name = "a" }, { name = "a" }]')),
    _config("streams.x.fields", "at least 1 entry", _stream("", "[]")),
    _config("streams.x.fields / 'a' / min 5", "above max 1", _stream("", '[{ name = "a", min = 5, max = 1 }]')),
    _config("streams.x.fields / Temp C", "letters, digits", _stream("", '[{ name = "Temp C" }]')),
    _config("streams.x.source / folder", "add", _stream('source = { kind = "files" }')),
    _config("streams.x.source.url / unknown key", "there is", _stream('source = { kind = "host", url = "ftp://x" }')),
    _config("streams.x.source.command", "list", _stream('source = { kind = "exec", command = "python3 a.py" }')),
    _config("streams.x.privacy / pulse", "there is", _stream('[streams.x.privacy]\nprivate = ["pulse"]')),
    _config("broker.url / tcp://127.0.0.1:1883", "mqtt://", swap=("mqtt://127", "tcp://127")),
    _config("broker.url / '192.168.1.5'", "mqtt://", swap=("mqtt://127.0.0.1:1883", "192.168.1.5")),
    _config("broker.url / mqtt://192.168.1.5", "mqtts://", swap=("mqtt://127.0.0.1:1883", "mqtt://192.168.1.5")),
    _config("broker.url / 99999", "65535", swap=("127.0.0.1:1883", "127.0.0.1:99999")),
    _config("broker.ca_file / ca.pem", "file", swap=('# ca_file = "ca.pem"', 'ca_file = "ca.pem"')),
    _config("collector.key / not a base64url", ".pub", swap=('key = ""', 'key = "abc"')),
    _config("collector.delivery / brokr", "did you mean 'broker'", swap=('= "collector"', '= "brokr"')),
    _config("operators.keys / not a base64url", ".pub", swap=("keys = []", 'keys = ["abc"]')),
    _config("buffer.commit_every / 1 sec", "10 s", swap=('"1 s"', '"1 sec"')),
    _config("intake.tcp / 0.0.0.0:7071", "127.0.0.1", '[intake]\ntcp = "0.0.0.0:7071"\n'),
    _config(
        "notify.targets.me.kind / emial",
        "did you mean 'email'",
        '[notify.targets.me]\nkind = "emial"\nurl = "https://x"\n',
    ),
    _config(
        "notify.routes[0].targets / mee",
        "did you mean 'me'",
        '[notify.targets.me]\nkind = "webhook"\nurl = "https://x/"\n[[notify.routes]]\ntargets = ["mee"]\n',
    ),
    _config("tasks.exercise.alerts[0] / name", "add", "[[tasks.exercise.alerts]]\nunchanged = '3 windows'\n"),
    _config("tasks.exercise.slices / mod", "did you mean 'mode'", 'slices = ["mod"]\n'),
    _config("tasks.exercise.learn_windows", "at least 20", swap=("learn_windows = 20", "learn_windows = 2")),
    _config("stream / unknown key", "did you mean 'streams'", '[stream.x]\nfields = [{ name = "a" }]\n'),
    Mistake(
        "batch" + _HERE,
        2,
        ("tasks.exercise.bundle", "exercize"),
        "did you mean 'exercise'",
        swap=('"exercise"', '"exercize"'),
    ),
    Mistake(
        "batch" + _HERE,
        1,
        ("/proc/nope", "data_dir"),
        "may write",
        swap=('data_dir = "data"', 'data_dir = "/proc/nope"'),
    ),
)
ROWS = (
    _rows("a,b\n1,2\n", "f.csv / 'a'", "--map", code=2),
    _rows("1,2,3,4,5,6\n", "f.csv / first line", "must name the columns", code=2),
    _rows(f"{_SIX}\nx,1,1,1,1,1\n", "line 2 / ax", "write numbers as"),
    _rows("", "f.csv / empty", "first line", code=2),
    _bare("ingest watch /bin/true" + _HERE, "/bin/true", "text"),
    _rows(f"t,{_SIX}\n2000,1,1,1,1,1,1\n1000,1,1,1,1,1,1\n", "line 3 / runs backwards", "sort"),
    _rows(f"{_SIX}\n1e39,1,1,1,1,1\n", "line 2 / ax", "f64"),
    _rows(f"{_SIX}\n1,1,1,1,1,1\n".replace(",", "|"), "f.csv / ax|ay", "--sep", code=2),
    _rows(f"t,{_SIX}\n1795769340000,1,1,1,1,1,1\n", "line 2 / t / milliseconds", "seconds since 1970"),
    _rows(f"t,{_SIX}\n2026-11-27 10:00:00,1,1,1,1,1,1\n", "line 2 / t / time zone", "Z"),
    _rows(f"t,{_SIX}\n27.11.2026 10:00,1,1,1,1,1,1\n", "line 2 / t / 27.11.2026", "2026-"),
    _rows(f"{_SIX},label\n1,1,1,1,1,1,PEN\n", "f.csv / 'label'", "--ignore", code=2),
    _rows(f"{_SIX}\n1,1,1,1,1\n", "line 2 / 5 values", "as many values"),
    _rows(f"{_SIX}\n1,1,1,1,1,1,1\n", "line 2 / 7 values", "as many values"),
    _rows(f"time,{_SIX}\n1,1,1,1,1,1,1\n", "f.csv / 'time'", "--map time=t", code=2),
    _rows("ax,ay,az\n1,1,1\n", "f.csv / wx", "--map", code=2),
    _rows(f"{_SIX}\n1,1,,1,1,1\n", "line 2 / az", "optional"),
    _rows('{"ax": 1}\n', "line 1 / ay", "optional", name="f.jsonl"),
    _rows("{ax: 1}\n", "line 1 / JSON", "quoted names", name="f.jsonl"),
    _device("ingest wath {rows.csv}", "wath / outstation.toml", "did you mean 'watch'"),
    _device("ingest watch {none.csv}", "none.csv / No such file", "check the name"),
    _rows("PK\x03\x04\n", "x.xlsx / is not read", ".csv", code=2, name="x.xlsx"),
    _rows(f"{_SIX}\n1,1,1,1,1,1\n", "--map / axx", "write", code=2, options=" --map axx"),
    _device("ingest watch {device}", "device", "file"),
    _device("label exercise {rows.csv}", "rows.csv / 'ax'", "row or t, label"),
    _device("label exercis {labels.csv}", "exercis", "did you mean 'exercise'"),
    Mistake(
        "label exercise {l.csv}" + _HERE,
        1,
        ("line 2",),
        "it knows PEN",
        files={"l.csv": "row,label\n100,PENN\n"},
    ),
    Mistake(
        "label exercise {l.csv}" + _HERE,
        1,
        ("line 2", "99999"),
        "outstation results",
        files={"l.csv": "row,label\n99999,PEN\n"},
    ),
)
QUERIES = (
    _device("batch exercis", "exercis", "did you mean 'exercise'"),
    _device("results exercis", "exercis", "did you mean 'exercise'"),
    _device("tail wath", "wath", "did you mean 'watch'"),
    _device("drift exercise --plot {x.jpg}", "x.jpg", ".svg"),
    _device("cost exercis", "exercis", "did you mean 'exercise'"),
    _device("privacy nope", "nope", "--help"),
    _device("reference show nope", "nope / outstation.toml", "exercise"),
    _device("reference relearn exercise --for 3", "--for / 3", "min"),
    _device("disclose exercise --rows 5", "--rows / 5", "1-"),
    _device("disclose exercise --rows 90000-90100", "90000", "keep_readings"),
    _device("verdict exercise 5 PENN --by me", "no label of this model", "it knows PEN", 1),
    _device("notify test nobody", "outstation.toml / target", "[notify"),
    _bare("status -c {fleet/fleet.toml}", "fleet.toml", "outstation fleet"),
)
MODELS = (
    _bare("model check nope", "nope", "built-in", 1),
    _bare("model check exercize", "exercize", "did you mean 'exercise'", 1),
    _bare("model check {bundle/model.tflite}", "model.tflite", "model pack", 1),
    _bare("model pack {nope.toml}", "SPEC", "-o"),
    _bare("model pack {nope.toml} -o {p}", "nope.toml", "SPEC"),
    _bare("model pack --from {rows.csv}", "rows.csv", "TFLite", 1),
    _bare("model pack {s.toml} -o {p}", "s.toml / labels", "two", s_toml='labels = ["a"]\n' + _SPEC),
    _bare("model pack {s.toml} -o {p}", "s.toml / mean / 6", "6", s_toml=_SPEC + "mean = [1.0]\nstd = [1.0]\n"),
    _bare(
        "model pack {s.toml} -o {p}",
        "s.toml / kind / classification",
        "did you mean 'classify'",
        s_toml=_SPEC.replace("classify", "classification"),
    ),
    _bare("model pack {s.toml} -o {p}", "model / none.tflite", "file", s_toml=_SPEC.replace("bundle/model", "none")),
    _bare("model run exercise {labels.csv} -o {o.csv}", "labels.csv / ax", "row, label"),
    _bare("model evaluate exercise {rows.csv}", "rows.csv / no column label", "there is ax"),
    _bare("model evaluate {bundle} {rows.csv} --label lable", "rows.csv / lable", "ax"),
    _bare(
        "model evaluate {bundle} {rows.csv} --publisher {publisher.key}", "publisher.key / private", "publisher.key.pub"
    ),
    _bare("model check {bundle} --publisher {publisher.key}", "publisher.key / private", "publisher.key.pub", 2),
    _bare("model sign {bundle} --sign-with {publisher.key.pub}", "publisher.key.pub / public", "private"),
    _bare("model sign {bundle} --sign-with {none.key}", "none.key", "model keygen"),
    _bare("model keygen {publisher.key}", "publisher.key", "move it away"),
    _bare("model config {rows.csv}", "rows.csv", "a folder or a .zip", 1),
    _bare("model evaluate exercise {none.csv}", "none.csv", "no such file"),
)
FLEETS = (
    _bare("fleet init {fleet}", "fleet.toml", "another folder"),
    _bare("fleet init {f1} --broker http://x", "--broker / http://x", "mqtts://"),
    _bare("fleet init {f1} --broker mqtt://192.168.1.5", "--broker / 192.168.1.5", "mqtts://"),
    _bare("fleet devices --dir {nowhere}", "fleet.toml", "--dir"),
    Mistake("fleet enrol pi@7" + _FLEET, 2, ("pi@7",), "a-z 0-9"),
    _fleet("enrol pi-07 --device-key D4_SFV4mHymIhim3gTLxzdVjDJWmTnIkEn0UPJLEJUs", "pi-07 / another key", "--replace"),
    _fleet("enrol pi-08 --device-key abc", "abc / Ed25519", "ends in .pub"),
    _fleet("enrol pi-08 --request {rows.csv}", "rows.csv", "outstation request"),
    _fleet("devices enrol-list {rows.csv} --out {out}", "rows.csv", "device"),
    _fleet("drift --since yesterday", "--since / yesterday", "24 h"),
    _fleet("rollout start {none.toml}", "none.toml", "rollouts.md"),
    _fleet(
        "rollout start {r.toml}",
        "r.toml / version / 9.9.9",
        "fleet publish",
        r_toml=_PLAN + '[[steps]]\nstrategy = "all"\nmin_agreement = 0.9\n',
    ),
    _fleet(
        "rollout start {r.toml}",
        "r.toml / steps[0].strategy / shadows",
        "did you mean 'shadow'",
        r_toml=_PLAN + '[[steps]]\nstrategy = "shadows"\n',
    ),
    _fleet("rollout promote nope", "nope", "none was started yet"),
    _fleet("devices revoke pi-99", "pi-99", "pi-07"),
    _fleet("command pi-99 report", "pi-99", "pi-07"),
    _fleet("command pi-07 reprot", "reprot", "did you mean 'report'"),
    _fleet("command pi-07 report", "127.0.0.1:1", "broker", code=1),
    _fleet("publish nope", "nope", "built-in"),
    _fleet("alerts acknowledge abc", "abc", "fleet alerts"),
    _fleet("labels add pi-07 exercis {labels.csv}", "exercis", "exercise"),
    _fleet("evidence --out {bundle}", "bundle", "new folder"),
    _bare(
        "fleet evidence verify {bundle} --operator {publisher.key.pub}", "manifest.jws / unknown key", "do not rely", 1
    ),
    _fleet("keys viewer pi@7", "pi@7", "a-z 0-9"),
    _fleet("db export --out {rows.csv}", "rows.csv", "name another", code=1),
    _fleet("alerts notify test nobody", "fleet.toml / target", "[notify"),
    _fleet("devices remove pi-99", "pi-99", "pi-07"),
    _fleet("audit --db {none.db}", "none.db", "creates it"),
)
MISTAKES = (*WORDS, *FOLDERS, *CONFIG, *ROWS, *QUERIES, *MODELS, *FLEETS)
