"""Field privacy of a whole system: values that statistics would show are sought in every byte that leaves.

Fields that never change show their value in a mean, whatever the least count. Published messages, notifications of
collector and device, documents for Home Assistant and Sparkplug, samples as their owner opens them, exported tables,
evidence, reports and journals are searched. A control without the rules finds each planted value.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from outstation.integrations.sparkplug.sparkplug_payload import _payload_type
from outstation.protocol.client import Client
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage
from outstation.protocol.wire.privacy.field_privacy import OPTIONAL_KINDS
from outstation.workbench.testing.fleet import LocalFleet
from outstation.workbench.testing.patience import wait_until
from tests.end_to_end.test_privacy import LABELS, PATIENTS, REJECTED, ROWS, T0, Hospital
from tests.integrations.notify.servers import Post, hook_server
from tests.kit.commands import audit_fleet, call_outstation

pytestmark = pytest.mark.attack("privacy")

# Of the fields b, c and weight: each keeps one value, so that its means and its alerts show it.
PLANTED = {"b": 0.7351129, "c": -0.6482917, "weight": 61.73193}
FILE_NAME = "bed-qx71.csv"
PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "privacy.md"
ALL = {"0.73511", "0.64829", *PATIENTS, FILE_NAME}
RULES = """
[streams.ward.privacy]
private = ["b"]
round = { c = 0.25, weight = 5 }
hash = ["patient"]
file_names = false
[streams.beds.privacy]
file_names = false
"""
STRICT = """
[streams.ward.privacy]
allow = []
messages = []
file_names = false
[streams.beds.privacy]
file_names = false
"""
# Everything that a device can send beside the messages of its tasks. Rows are an hour old.
DEVICE_OUTLETS = """
[homeassistant]
max_age = "1 d"
[samples]
consent = "the test: readings for retraining"
uncertain_below = 1.0
digits = 7
[[tasks.tiny.alerts]]
name = "still"
unchanged = "3 windows"
severity = "critical"
"""


def notify_section(url: str) -> str:
    return (
        f'[notify]\ngroup_for = "1 s"\n[notify.targets.hook]\nkind = "webhook"\nurl = "{url}"\n'
        '[[notify.routes]]\ntargets = ["hook"]\nseverity = "info"\n'
    )


class Bridges:
    """A client of Home Assistant's and Sparkplug's topics: each message as (topic, text)."""

    def __init__(self, broker: BrokerConfig) -> None:
        topics = ["homeassistant/#", "outstation-bridge/#", "spBv1.0/#"]
        self._link = Link(broker, "bridges", subscribe=topics)
        self.messages: list[tuple[str, str]] = []

    def close(self) -> None:
        self._link.close()

    def wait(self, topic: str, words: str = "") -> None:
        """Wait for a message with `words` on a topic with this part."""

        def is_there() -> bool:
            for event in self._link.receive(0.1):
                if isinstance(event, IncomingMessage):
                    self._link.acknowledge(event)
                    self.messages.append((event.topic, self._read(event)))
            return any(topic in name and words in text for name, text in self.messages)

        wait_until(f"{topic} {words}", is_there)

    def text(self) -> str:
        return "\n".join(text for _, text in self.messages)

    @staticmethod
    def _read(event: IncomingMessage) -> str:
        # The numbers of Sparkplug are binary.
        if event.topic.startswith("spBv1.0/"):
            return str(_payload_type().FromString(event.payload))
        return event.payload.decode()


def feed(hospital: Hospital) -> None:
    """Send rows with constant fields, labels for them, and a file."""
    with Client(hospital.device.data_dir / "intake.sock", name="nurse") as client:
        for i in range(ROWS):
            values = {"a": i % 7 / 10, "d": i % 5 / 10, **PLANTED, "patient": PATIENTS[i % 2]}
            client.send("ward", t=T0 + i, **values)
        client.send("ward", t=T0 + ROWS, a=REJECTED, d=0.0, **PLANTED, patient=PATIENTS[0])
        assert len(client.flush().rejected) == 1
        wait_until("the batches", lambda: hospital.fleet.last_result_row("ward-1", "tiny") == ROWS)
        for row in range(1, LABELS + 1):
            client.label("tiny", ("left", "right", "rest")[row % 3], row=row)
        client.flush()
    folder = hospital.folder / "beds"
    folder.mkdir(exist_ok=True)
    (hospital.folder / FILE_NAME).write_text("n\n1\n")
    shutil.move(hospital.folder / FILE_NAME, folder / FILE_NAME)
    wait_until("the file", lambda: (folder / "done" / FILE_NAME).exists())


def open_samples(hospital: Hospital) -> str:
    """Return the readings in the retraining set, which only the owner of the fleet's key can open."""
    out = hospital.folder / "dataset"
    done = call_outstation(
        *("fleet", "dataset", "export", "--task", "tiny", "--format", "csv"),
        *("--out", str(out), "--dir", str(hospital.fleet.home)),
    )
    assert done.returncode == 0, done.stderr
    return "\n".join(path.read_text() for path in sorted(out.rglob("*")) if path.is_file())


def texts(posts: Sequence[Post]) -> str:
    return "\n".join(post.body.decode() for post in list(posts))


def everything_that_leaves(hospital: Hospital, others: dict[str, str]) -> str:
    """Return the text of all that leaves: broker, database, `others`, tables, evidence, reports and journals."""
    tables = hospital.folder / "tables"
    done = call_outstation("fleet", "export", "--out", str(tables), "--dir", str(hospital.fleet.home))
    assert done.returncode == 0, done.stderr
    exported = [str(parquet.read_table(path).to_pylist()) for path in sorted(tables.rglob("*.parquet"))]
    assert exported
    # The collector's rules hold for messages with withheld fields, too.
    assert audit_fleet(hospital.fleet.home)[0] == 0
    # The device's own screen is not a way out.
    return "\n".join([hospital.everything(local=False).decode(errors="replace"), *exported, *others.values()])


def documented(column: int) -> dict[str, bool]:
    """Return what docs/concepts/privacy.md says of each thing: whether it leaves. Columns count from 1."""
    lines = PAGE.read_text(encoding="utf-8").partition("### What leaves\n")[2].partition("\n#")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    answers = {row[0]: row[column].partition(",")[0] for row in rows[3:]}
    assert set(answers.values()) <= {"yes", "no"}
    return {name: answer == "yes" for name, answer in answers.items()}


def observed(hospital: Hospital, others: dict[str, str], text: str) -> dict[str, bool]:
    """Return whether each thing of the page's table has left; `text` is everything."""
    results, quality = hospital.messages("results"), json.dumps(hospital.messages("quality"))
    drift, alerts = json.dumps(hospital.messages("drift")), json.dumps(hospital.messages("alerts"))
    # Values that a rule has coarsened, and values of no field, leave nowhere.
    assert "61.7319" not in text
    assert str(REJECTED) not in text
    journal = hospital.device.log.read_text()
    outlets = {
        "in the log and the fleet's database": alerts,
        "in notifications of the device": others["device's notifications"],
        "in notifications of the collector": others["collector's notifications"],
        "in Home Assistant and Sparkplug": others["bridges"],
    }
    return {
        "readings around results, with consent to samples": "0.73511" in others["samples"],
        "mean, counts in bins and divergences of a field": "0.73511" in drift,
        "text of a category": any(patient in text for patient in PATIENTS),
        "predictions": any(body["columns"]["row"] for body in results),
        "counts of labels and metrics": '"labels"' in quality,
        "names of fields": re.search(r"(?<!-)\bweight\b", text) is not None,
        "names of files in the journal": FILE_NAME in journal,
        "values of rejected rows in the journal": str(REJECTED) in journal,
        **{f"that an alert was raised, {outlet}": "fault" in shown for outlet, shown in outlets.items()},
        **{f"what an alert says of a field, {outlet}": "b: repeats" in shown for outlet, shown in outlets.items()},
        "health, versions, names of streams and tasks": bool(hospital.messages("health")) and "tiny" in text,
    }


@pytest.mark.parametrize(
    ("rules", "column"),
    [
        pytest.param("", 1, marks=pytest.mark.attack("privacy", control=True), id="open"),
        pytest.param(RULES, 2, id="protected"),
        pytest.param(STRICT, 3, id="strict"),
    ],
)
def test_values_of_protected_fields_are_in_no_byte_that_leaves(tmp_path: Path, rules: str, column: int) -> None:
    beds = (
        '[streams.beds]\nfields = [{ name = "n" }]\n'
        f'source = {{ kind = "files", folder = "{tmp_path / "beds"}", poll_interval = "50 ms" }}\n'
    )
    with hook_server() as hook, hook_server() as own_hook, LocalFleet(tmp_path) as fleet:
        toml = fleet.home / "fleet.toml"
        toml.write_text(f'{toml.read_text()}\n{notify_section(hook.url)}[sparkplug]\nmax_age = "1 d"\n')
        hospital = Hospital(tmp_path, fleet, beds + rules + DEVICE_OUTLETS + notify_section(own_hook.url))
        with contextlib.closing(Bridges(BrokerConfig(url=fleet.broker.url))) as bridges:
            feed(hospital)
            bridges.wait("latest/ward-1/_device")
            bridges.wait("/DBIRTH/")
            if rules != STRICT:
                wait_until("label metrics", lambda: hospital.messages("quality"))
                wait_until(
                    "notifications", lambda: all("b: " in texts(posts) for posts in (hook.posts, own_hook.posts))
                )
                wait_until("samples", lambda: hospital.messages("samples"))
                bridges.wait("event/ward-1", "b: ")
                bridges.wait("latest/ward-1/tiny/drift")
                bridges.wait("spBv1.0/acme/D", "tiny/Drift")
        others = {
            "collector's notifications": texts(hook.posts),
            "device's notifications": texts(own_hook.posts),
            "bridges": bridges.text(),
            "samples": open_samples(hospital) if rules != STRICT else "",
        }
        text = everything_that_leaves(hospital, others)
        assert observed(hospital, others, text) == documented(column)
        kinds = {kind for (kind,) in fleet.query("SELECT DISTINCT kind FROM messages")}
    if rules:
        shown = {value: text[max(0, at - 200) : at + 100] for value in ALL if (at := text.find(value)) >= 0}
        assert shown == {}
    if rules == STRICT:
        assert not kinds & OPTIONAL_KINDS
        assert not own_hook.posts
    else:
        assert kinds >= {"drift", "quality", "alerts", "samples"}
    if rules == RULES:
        assert "patient=h:" in text
