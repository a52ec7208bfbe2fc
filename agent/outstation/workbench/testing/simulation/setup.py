"""Setup of a simulated fleet: the config of its devices, their bundles and their recordings."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from outstation.device import config
from outstation.device.bootstrap import tasks
from outstation.device.config.config import Config
from outstation.device.config.streams import NO_STREAM
from outstation.device.config.tasks import NO_TASK
from outstation.foundation import input_files
from outstation.foundation.config.toml_files import did_you_mean, encode_key, encode_value
from outstation.foundation.errors import BadBundle, ConfigError, UsageError
from outstation.ml.model.bundle import builtin
from outstation.ml.model.bundle import bundle as bundle_files
from outstation.ml.model.bundle.manifest import Manifest
from outstation.protocol.wire.keys import PublicKey
from outstation.workbench.testing.simulation import feed
from outstation.workbench.testing.simulation.feed import RecordingFile

# Sections that enrolment writes, and those that would start threads or connections of their own.
_REPLACED = ("device", "broker", "collector", "operators", "updates", "homeassistant", "notify", "intake")
# The config without --config: the built-in task on its recordings.
_DEFAULT_CONFIG = """\
[device]
id = "sim"
fleet = "sim"

[streams.watch]
fields = [
  { name = "ax", unit = "g" }, { name = "ay", unit = "g" }, { name = "az", unit = "g" },
  { name = "wx", unit = "rad/s" }, { name = "wy", unit = "rad/s" }, { name = "wz", unit = "rad/s" },
]

[tasks.exercise]
stream = "watch"
bundle = "exercise"
schedule = "every 60 s"
learn_windows = 40

[buffer]
commit_every = "10 s"
"""


class Setup(msgspec.Struct, frozen=True, eq=False):
    """Config of all devices, as a document and parsed; recordings by stream, manifests of the bundles by task."""

    document: dict[str, Any]
    config: Config
    recordings: dict[str, RecordingFile]
    manifests: dict[str, Manifest]

    @property
    def fields(self) -> dict[str, list[str]]:
        """Fields of each stream."""
        return {name: [field.name for field in stream.fields] for name, stream in self.config.streams.items()}

    @property
    def optional_fields(self) -> dict[str, list[str]]:
        """Fields of each stream that a row may lack."""
        streams = self.config.streams.items()
        return {name: [field.name for field in stream.fields if field.optional] for name, stream in streams}

    @property
    def task_streams(self) -> dict[str, list[str]]:
        """Streams that each task reads."""
        tasks = self.config.tasks.items()
        return {name: [task.stream, *(joined.stream for joined in task.inputs.values())] for name, task in tasks}

    @property
    def batch_s(self) -> dict[str, float]:
        """Least seconds from one batch of each task to the next, 0 where its schedule is no plain interval."""
        intervals = {}
        for name, task in self.config.tasks.items():
            with suppress(ValueError):
                intervals[name] = config.parse_duration(task.schedule.removeprefix("every "))
        return {name: intervals.get(name, 0.0) for name in self.config.tasks}

    @property
    def class_tasks(self) -> list[str]:
        """Tasks whose model names classes."""
        return [name for name, manifest in self.manifests.items() if manifest.output.labels]

    def device_toml(self, enrolled: str, group: str) -> str:
        """Return the config of a device in a group: `enrolled`, which enrolment wrote, and this setup's sections."""
        own = tomllib.loads(enrolled)
        # Random bytes: what is sealed to it is another one each time.
        if not self.config.privacy.encrypt and self.config.samples is None:
            own["collector"].pop("encryption_key", None)
        own["device"]["groups"] = [*dict.fromkeys([*self.config.device.groups, group])]
        sections = {**own, **{name: self.document[name] for name in self.document if name not in _REPLACED}}
        if isinstance(metered := self.document.get("broker", {}).get("metered"), dict):
            sections["broker"]["metered"] = metered
        return render_toml(sections)


def render_toml(document: Mapping[str, Any]) -> str:
    """Return a document as TOML: a section for each table of it, and the values before them."""
    lines = [f"{encode_key(key)} = {encode_value(value)}" for key, value in document.items() if not _is_section(value)]
    for name, members in document.items():
        if _is_section(members):
            lines += ["", f"[{encode_key(name)}]"]
            lines += [f"{encode_key(key)} = {encode_value(value)}" for key, value in members.items()]
    return "\n".join([*lines, ""])


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping)


def load(
    file: Path | None,
    folder: Path,
    bundles: Mapping[str, str],
    recordings: Mapping[str, tuple[Path, Sequence[str]]],
    publishers: Sequence[PublicKey],
) -> Setup:
    """Read a device's config; `bundles` by task replace those of the config, "" being the only task.

    `recordings`: file and columns by stream. Without a `file`, the config is that of the built-in exercise task,
    written to `folder`. Raises ConfigError, UsageError, BadBundle.
    """
    if file is None:
        file = folder / "simulated.toml"
        file.write_text(_DEFAULT_CONFIG, encoding="utf-8")
        recordings = recordings or {"watch": (builtin.recordings_dir() / "exercise.npz", ())}
    parsed = config.load(file)
    document = tomllib.loads(input_files.read_text(file))
    document["models"] = {**document.get("models", {}), "confinement": "off"}
    listed = [*parsed.publishers.keys, *(key.text for key in publishers)]
    if listed:
        document["publishers"] = {**document.get("publishers", {}), "keys": listed}
    for name, stream in parsed.streams.items():
        if stream.media_format is not None:
            problem = "images and sounds cannot be simulated; give the stream fields and a recording of their rows"
            raise ConfigError(str(file), f"streams.{name}.source", problem)
        document["streams"][name].pop("source", None)
    loaded = _load_recordings(file, parsed, recordings)
    return Setup(document, parsed, loaded, _replace_bundles(file, document, parsed, bundles, publishers))


def _replace_bundles(
    file: Path, document: dict[str, Any], parsed: Config, bundles: Mapping[str, str], publishers: Sequence[PublicKey]
) -> dict[str, Manifest]:
    """Put the path of each task's bundle into the document; return the manifests. Raises UsageError, BadBundle.

    A device that rejects its bundle runs without the task: what is then not found says nothing about the model.
    """
    chosen, manifests = dict[str, Path](), dict[str, Manifest]()
    listed = tasks.parse_public_keys(file, "publishers.keys", parsed.publishers.keys)
    trusted = [*listed, *publishers, *builtin.publisher_keys()]
    for task, bundle in bundles.items():
        if not task and len(parsed.tasks) != 1:
            raise UsageError(
                f"--bundle {bundle}: the config has {len(parsed.tasks)} tasks; write --bundle TASK={bundle}"
            )
        name = task or next(iter(parsed.tasks))
        if name not in parsed.tasks:
            hint = did_you_mean(task, parsed.tasks, NO_TASK)
            raise UsageError(f"--bundle {task}={bundle}: no task {task!r} in the config{hint}")
        chosen[name] = builtin.resolve_path(Path(bundle))
    for name, task_config in parsed.tasks.items():
        try:
            path = chosen.get(name) or builtin.locate_bundle(task_config.bundle, parsed.data_dir / "bundles")
            verified = bundle_files.read(path, trusted)
        except BadBundle as problem:
            if name in chosen:
                raise UsageError(f"--bundle {name}={chosen[name]}: {problem}") from None
            raise ConfigError(str(file), f"tasks.{name}.bundle", f"{problem}; or name another with --bundle") from None
        tasks.check_fields(file, parsed, name, verified)
        is_builtin = path.parent == builtin.bundles_dir()
        document["tasks"][name]["bundle"] = path.name if is_builtin else str(path.resolve())
        manifests[name] = verified.manifest
    return manifests


def _load_recordings(
    file: Path, parsed: Config, recordings: Mapping[str, tuple[Path, Sequence[str]]]
) -> dict[str, RecordingFile]:
    for name in recordings:
        if name not in parsed.streams:
            hint = did_you_mean(name, parsed.streams, NO_STREAM)
            raise UsageError(f"--recording {name}=…: no stream {name!r} in {file}{hint}")
    used = {task.stream for task in parsed.tasks.values()}
    used |= {joined.stream for task in parsed.tasks.values() for joined in task.inputs.values()}
    if missing := sorted(used - recordings.keys()):
        raise UsageError(f"{file}: stream {missing[0]!r} has no recording; add --recording {missing[0]}=FILE")
    return {name: feed.load(path, parsed.streams[name], columns) for name, (path, columns) in recordings.items()}
