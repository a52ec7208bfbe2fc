"""docs/reference: the wire format's tables and AsyncAPI document match the code, and validators agree with both."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage
from outstation.protocol.wire.jws import digest
from outstation.protocol.wire.topics import KINDS
from outstation.workbench.testing.fleet import FIELDS, RECORDINGS, LocalFleet, field_tables
from outstation.workbench.testing.messages import MessageSender
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import find_program
from scripts import wire_documents
from scripts.kit.steps import CACHE
from tests.kit.commands import call_outstation
from tests.kit.devices import expand_columns

Message = dict[str, Any]
PACKAGES = ("@asyncapi/parser@3", "ajv@8")
VALIDATE = """
const fs = require("fs");
const { Parser } = require("@asyncapi/parser");
const Ajv = require("ajv");
const text = fs.readFileSync(process.argv[2], "utf8"), document = JSON.parse(text);
const messages = JSON.parse(fs.readFileSync(0, "utf8"));
new Parser().parse(text).then(({ diagnostics }) => {
  const ajv = new Ajv({ strict: false, allErrors: true });
  ajv.addSchema(document, "doc");
  const errors = messages.map(({ kind, payload }) => {
    const name = document.components.messages[kind].payload.$ref;
    const validate = ajv.getSchema("doc" + name);
    return validate(payload) ? [] : validate.errors;
  });
  console.log(JSON.stringify({ diagnostics, errors }));
});
"""


def test_the_asyncapi_document_is_that_of_the_structs() -> None:
    assert wire_documents.ASYNCAPI.read_text(encoding="utf-8") == wire_documents.render_asyncapi(), (
        "run python -m scripts.wire_documents"
    )


def test_patterns_are_those_of_ecma_262() -> None:
    patterns = re.findall(r'"pattern": "(.*)"', wire_documents.render_asyncapi())
    assert len(patterns) > 10
    assert not [pattern for pattern in patterns if re.search(r"\\\\[AZz]|\(\?P|\\\\d", pattern)]


def test_the_tables_of_the_wire_format_are_those_of_the_structs() -> None:
    text = wire_documents.WIRE_FORMAT.read_text(encoding="utf-8")
    assert wire_documents.update_tables(text) == text, "run python -m scripts.wire_documents"
    assert "|  |" not in text, "a member has no meaning yet"
    documented = set(re.findall(r"<!-- members: (\w+) -->", text))
    runs = {"RowRun", "TimeRun", "LabelRun", "Headers"}
    assert documented - {"LoggedPayload"} == wire_documents.build_document()["components"]["schemas"].keys() - runs


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[Message]:
    """Return messages of each kind from a real daemon, collector and operator; the test signs `desired`, `shadow`."""
    with LocalFleet(tmp_path_factory.mktemp("recorded")) as fleet:
        fleet.broker.start()
        link = Link(BrokerConfig(url=fleet.broker.url), "recorder", subscribe=["outstation/#"])
        fleet.collector.start()
        # A stuck channel raises an alert.
        source = f'kind = "replay", file = "{RECORDINGS}", speed = 40.0'
        faults = '[{ kind = "stuck", fields = ["wx"], from_row = 4000 }]'
        fields = ", ".join(field_tables(FIELDS))
        device = fleet.add_device("pi-01").append_config(
            f"[streams.watch]\nfields = [{fields}]\nsource = {{ {source}, faults = {faults} }}\n"
            '[samples]\nconsent = "readings of the shipped recording"\nuncertain_below = 1.0\n'
        )
        device.add_task("exercise", extra_toml="learn_windows = 20").start_and_wait()
        messages: list[dict[str, Any]] = []

        def record() -> set[str]:
            for event in link.receive(0.2):
                if isinstance(event, IncomingMessage):
                    link.acknowledge(event)
                    messages.append({"kind": event.topic.split("/")[3], "payload": json.loads(event.payload)})
            return {message["kind"] for message in messages}

        home = str(fleet.home)
        wait_until("results arrive", lambda: "results" in record() and fleet.last_result_row("pi-01") > 8000)
        # A device reports its metrics after 50 labels.
        results = [expand_columns(m["payload"]["columns"]) for m in messages if m["kind"] == "results"]
        rows = [row for columns in results for row in columns["row"]][:60]
        labels = json.dumps({"row": rows, "label": ["PEN"] * len(rows)})
        for command in (("report",), ("label", "exercise", labels)):
            done = call_outstation("fleet", "command", "pi-01", *command, "--dir", home, "--wait", "60", "--json")
            assert done.returncode == 0, done.stdout + done.stderr
        # The broker publishes the Will of a killed daemon.
        device.kill()
        device.start_and_wait()
        wanted = KINDS.keys() - {"shadow", "desired"}
        try:
            wait_until("a message of each kind", lambda: wanted <= record(), 120)
        except AssertionError as error:
            error.add_note(f"none came of {sorted(wanted - record())}")
            raise
        link.close()
    sender = MessageSender("pi-01")
    desired = {"v": 1, "kind": "desired", "device": "_all", "counter": 1, "issued": "2026-11-24T22:18:01Z", "tasks": {}}
    return [*messages, {"kind": "desired", "payload": desired},
            {"kind": "shadow", "payload": json.loads(sender.shadow().payload)}]  # fmt: skip


@pytest.fixture(scope="module")
def altered(recorded: list[Message]) -> list[Message]:
    """Return results that the structs refuse."""
    results = next(message["payload"] for message in recorded if message["kind"] == "results")
    changes = ({"seq": 0}, {"rows": [1]}, {"log": "x"}, {"columns": {"row": [[1, 1]], "t": []}})
    return [{"kind": "results", "payload": results | change} for change in changes]


def install_packages(folder: Path) -> None:
    """Install the validators, once for all checkouts: npm takes ten seconds of the processor for them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        (Path(made) / "package.json").write_text('{"private": true}')
        options = ["--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=20000"]
        environment = os.environ | {"npm_config_update_notifier": "false"}
        command = [find_program("npm"), "install", *PACKAGES, *options, "--prefer-offline"]
        installed = subprocess.run(command, cwd=made, env=environment, capture_output=True, text=True, timeout=240)
        if installed.returncode:
            pytest.skip(f"npm packages {', '.join(PACKAGES)} cannot be installed")
        # Another run may have been faster.
        with contextlib.suppress(OSError):
            Path(made).rename(folder)
            Path(made).mkdir()


class Validation(msgspec.Struct):
    """Diagnostics of the document by the official parser, and errors of each message by ajv."""

    diagnostics: list[dict[str, Any]]
    errors: list[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def validation(recorded: list[Message], altered: list[Message], tmp_path_factory: pytest.TempPathFactory) -> Validation:
    """Validate the recorded messages, then the altered ones, in one process: loading the parser takes seconds."""
    node, modules = find_program("node"), CACHE / f"npm-{digest(' '.join(PACKAGES).encode())[:12]}"
    if not modules.exists():
        install_packages(modules)
    folder = tmp_path_factory.mktemp("node")
    (folder / "node_modules").symlink_to(modules / "node_modules")
    (folder / "validate.cjs").write_text(VALIDATE)
    command = [node, "validate.cjs", str(wire_documents.ASYNCAPI)]
    text = json.dumps([*recorded, *altered])
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, check=True)
    return msgspec.json.decode(done.stdout, type=Validation)


def test_the_official_parser_accepts_the_document(validation: Validation) -> None:
    # 0 is an error and 1 a warning; hints such as a missing contact are ignored.
    assert [diagnostic for diagnostic in validation.diagnostics if diagnostic["severity"] <= 1] == []


def test_ajv_accepts_every_message_of_a_recorded_run(recorded: list[Message], validation: Validation) -> None:
    assert {message["kind"] for message in recorded} == KINDS.keys()
    assert [errors for errors in validation.errors[: len(recorded)] if errors] == []


def test_ajv_refuses_what_the_structs_refuse(recorded: list[Message], validation: Validation) -> None:
    assert all(validation.errors[len(recorded) :])
    assert len(validation.errors) == len(recorded) + 4
