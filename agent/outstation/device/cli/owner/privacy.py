"""Command `outstation privacy`: what leaves the device of each field, in which message, with an example."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import click
import numpy as np

from outstation.device.bootstrap import device
from outstation.device.config import Config, FieldConfig, StreamConfig
from outstation.device.samples.rounding import protect_column
from outstation.foundation import clock
from outstation.foundation.cli.options import config_options
from outstation.foundation.cli.output import echo, emit, print_table
from outstation.foundation.text import printable
from outstation.protocol.wire import commitment
from outstation.protocol.wire.privacy.field_privacy import OPEN, FieldPrivacy

_EXAMPLE, _EXAMPLE_TEXT = 21.374, "Room 7"
_ROWS = 40
_MESSAGES = ("drift", "alerts", "audit", "samples", "quality")


@click.command(epilog="Example: outstation privacy")
@config_options
def privacy(config_file: str | None, as_json: bool) -> None:
    """Print what leaves this device: the rule of each field, the messages that contain it, and an example.

    The examples are made-up readings that went through the rules of this config. [streams.NAME.privacy] sets the rules;
    readings themselves never leave, unless the owner consents to [samples].
    """
    _, conf = device.load_config(config_file)
    document = build_document(conf)
    emit(document, as_json, lambda: _print(document))


def build_document(conf: Config) -> dict[str, Any]:
    # Hashes of examples need no key of the device, and show none.
    rules = device.build_privacy(conf, secrets.token_bytes(commitment.SECRET_BYTES))
    streams = []
    for name, stream in conf.streams.items():
        tasks = [task for task, settings in conf.tasks.items() if settings.stream == name]
        joining = [task for task in tasks if conf.tasks[task].inputs]
        streams.append(
            {
                "stream": name,
                "tasks": tasks,
                "joined_by": [
                    task
                    for task, settings in conf.tasks.items()
                    if any(joined.stream == name for joined in settings.inputs.values())
                ],
                "joining_tasks": [_describe_joining(conf, task, rules.get(task, OPEN)) for task in joining],
                "min_count": max(conf.privacy.min_count, stream.privacy.min_count),
                "min_results": stream.privacy.min_results,
                "messages": stream.privacy.messages,
                "file_names_in_journal": stream.privacy.file_names,
                "fields": [
                    {
                        "field": field.name,
                        "rule": _name_rule(stream, field),
                        "leaves": _merge_examples(
                            {task: [*_list_examples(conf, task, field, rules.get(task, OPEN))] for task in tasks}
                        ),
                    }
                    for field in stream.fields
                ],
            }
        )
    return {
        "min_count": conf.privacy.min_count,
        "values_in_logs": conf.privacy.values_in_logs,
        "encrypt": conf.privacy.encrypt,
        "streams": streams,
    }


def _describe_joining(conf: Config, task: str, rules: FieldPrivacy) -> dict[str, Any]:
    """Return the strictest limits of the streams that a task's results rest on."""
    return {
        "task": task,
        "joins": sorted({joined.stream for joined in conf.tasks[task].inputs.values()}),
        "min_count": max(conf.privacy.min_count, rules.min_count),
        "min_results": rules.min_results,
        "messages": None if rules.kinds is None else sorted(rules.kinds),
    }


def _name_rule(stream: StreamConfig, field: FieldConfig) -> str:
    rules = stream.privacy
    if field.name in rules.private_fields([f.name for f in stream.fields]):
        return "private"
    if field.name in rules.hash:
        return f"hash, a new key every {rules.hash_period / 86_400:g} days"
    return f"round to {rules.round[field.name]:g}" if field.name in rules.round else "open"


def _merge_examples(by_task: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return each example once, with the tasks whose messages contain it: their rules may differ."""
    merged: list[dict[str, Any]] = []
    for task, examples in by_task.items():
        for example in examples:
            same = next((each for each in merged if each == {**example, "tasks": each["tasks"]}), None)
            if same is None:
                merged.append({**example, "tasks": [task]})
            else:
                same["tasks"].append(task)
    return sorted(merged, key=lambda each: _MESSAGES.index(each["message"]))


def _list_examples(conf: Config, task: str, field: FieldConfig, rules: FieldPrivacy) -> Iterator[dict[str, Any]]:
    """Yield the messages about a task that contain a field, each with the protected form of a made-up value."""
    now_us, name = clock.read().wall_us, field.name
    value = _EXAMPLE if field.min is None or field.max is None else field.min + 0.61803 * (field.max - field.min)
    for kind, member, body in _build_bodies(name, value):
        if not rules.keeps(kind):
            yield {"message": kind, "member": member, "example": _find(rules.apply(kind, body, now_us), member)}
    is_sampled = conf.samples is not None and conf.samples.covers(task) and rules.min_results <= 1
    if conf.samples is not None and is_sampled and field.type != "category" and not rules.keeps("samples"):
        readings = protect_column(name, np.array([value]), conf.samples.digits, rules, now_us)
        if readings is not None:
            yield {"message": "samples", "member": name, "example": {"sealed": readings}}
    is_sliced = any(name == (s if isinstance(s, str) else s.field) for s in conf.tasks[task].slices)
    if is_sliced and not rules.keeps("quality"):
        text = _EXAMPLE_TEXT if field.type == "category" else "below 20"
        metric = {"metric": "accuracy", "value": 0.93, "n": _ROWS, "slice": f"{name}={text}"}
        limited = rules.apply("quality", {"metrics": [metric]}, now_us)
        example = limited["metrics"] or {"withheld": limited["withheld"]}
        yield {"message": "quality", "member": "metrics", "example": example}


def _build_bodies(name: str, value: float) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (kind, member, body) of made-up messages."""
    feature = {
        "counts": [12, 20, 8],
        "missing": 0,
        "below": 0,
        "above": 0,
        "mean": round(value, 3),
        "m2": 4.2,
        "psi": 0.02,
        "js": 0.004,
        "ks": 0.05,
        "w1": 0.06,
        "cusum": {"mean": [0.3, 0], "limit": 8.5},
        "state": "ok",
        "fault": None,
    }
    yield "drift", f"features.{name}", {"window": {"n": _ROWS}, "features": {name: feature}, "joint": None}
    alert = {
        "alert": "drift",
        "subject": name,
        "state": "raised",
        "summary": f"{name}: mean {value:.3f}, was {value * 0.9:.3f}.",
        "evidence": {"test": "mean", "now": round(value, 3)},
    }
    yield "alerts", "", alert
    learned = {"n": 1600, "mean": round(value, 3), "sd": 0.317}
    yield "audit", f"evidence.fields.{name}", {"event": "learned", "evidence": {"fields": {name: learned}}}


def _find(body: Mapping[str, Any], member: str) -> Any:
    value: Any = body
    for name in member.split(".", 2) if member else ():
        value = value[name] if isinstance(value, Mapping) and name in value else None
    return value


def _print(document: Mapping[str, Any]) -> None:
    journal = f"The journal {'shows' if document['values_in_logs'] else 'leaves out'} the values of rejected rows."
    echo(f"No number rests on fewer than {document['min_count']} readings. {journal}")
    sealed = "Messages are sealed to the collector." if document["encrypt"] else "The broker can read the messages."
    echo(f"{sealed}\n")
    for stream in document["streams"]:
        kinds = stream["messages"]
        echo(f"stream {stream['stream']}, tasks {', '.join(stream['tasks']) or '–'}")
        if joined_by := stream["joined_by"]:
            echo(f"  Joined by {', '.join(joined_by)}: its rules hold for messages about these tasks, too.")
        if not stream["tasks"]:
            if not joined_by:
                echo("  No task: only the number of its rows leaves, in health messages.")
            echo("")
            continue
        for joining in stream["joining_tasks"]:
            listed = (
                "all kinds of messages"
                if joining["messages"] is None
                else ", ".join(joining["messages"]) or "no messages"
            )
            least = (
                f"at least {joining['min_count']} readings behind a number, {joining['min_results']} results of a class"
            )
            echo(
                f"  {joining['task']} joins {', '.join(joining['joins'])}. The strictest rules hold: {listed}; {least}."
            )
        if kinds is not None:
            echo(f"  Only these messages leave: {', '.join(kinds) or 'none'}; results without predictions still do.")
        rows = [
            [
                *(field["field"], field["rule"], _name_message(leaf, stream["tasks"])),
                printable(json.dumps(leaf["example"], ensure_ascii=False)),
            ]
            for field in stream["fields"]
            for leaf in field["leaves"] or [{"message": "–", "example": None, "tasks": stream["tasks"]}]
        ]
        print_table(["field", "rule", "message", "what leaves, as an example"], rows, "")
        echo("")


def _name_message(leaf: Mapping[str, Any], tasks: list[str]) -> str:
    """Return the kind of message, with the tasks if not all tasks of the stream send it so."""
    return leaf["message"] if leaf["tasks"] == tasks else f"{leaf['message']} ({', '.join(leaf['tasks'])})"
