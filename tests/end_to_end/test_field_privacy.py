"""Field privacy of a whole system: values that statistics would show are sought in every byte that leaves.

Fields that never change show their value in a mean, whatever the least count. Published messages, notifications,
exported tables, evidence, reports and journals are searched. A control without the rules finds each planted value.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from agent.client import Client
from agent.testing.fleet import LocalFleet
from agent.testing.process import wait_until
from tests.end_to_end.test_privacy import LABELS, PATIENTS, ROWS, T0, Hospital
from tests.kit.commands import audit_fleet, call_outstation
from tests.notify.servers import HookServer, hook_server

pytestmark = pytest.mark.attack("privacy")

# Of the fields b, c and weight: each keeps one value, so that its means and its alerts show it.
PLANTED = {"b": 0.7351129, "c": -0.6482917, "weight": 61.73193}
FILE_NAME = "bed-qx71.csv"
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


def feed(hospital: Hospital) -> None:
    """Send rows with constant fields, labels for them, and a file."""
    with Client(hospital.device.data_dir / "intake.sock", name="nurse") as client:
        for i in range(ROWS):
            values = {"a": i % 7 / 10, "d": i % 5 / 10, **PLANTED, "patient": PATIENTS[i % 2]}
            client.send("ward", t=T0 + i, **values)
        client.flush()
        wait_until("the batches", lambda: hospital.fleet.last_result_row("ward-1", "tiny") == ROWS)
        for row in range(1, LABELS + 1):
            client.label("tiny", ("left", "right", "rest")[row % 3], row=row)
        client.flush()
    folder = hospital.folder / "beds"
    folder.mkdir(exist_ok=True)
    (hospital.folder / FILE_NAME).write_text("n\n1\n")
    shutil.move(hospital.folder / FILE_NAME, folder / FILE_NAME)
    wait_until("the file", lambda: (folder / "done" / FILE_NAME).exists())


def everything_that_leaves(hospital: Hospital, hook: HookServer) -> str:
    """Return the text of all that leaves: broker, database, notifications, tables, evidence, reports and journals."""
    tables = hospital.folder / "tables"
    done = call_outstation("fleet", "export", "--out", str(tables), "--dir", str(hospital.fleet.home))
    assert done.returncode == 0, done.stderr
    exported = [str(parquet.read_table(path).to_pylist()) for path in sorted(tables.rglob("*.parquet"))]
    assert exported
    # The collector's rules hold for messages with withheld fields, too.
    assert audit_fleet(hospital.fleet.home)[0] == 0
    notified = [post.body.decode() for post in hook.posts]
    # The device's own screen is not a way out.
    return "\n".join([hospital.everything(local=False).decode(errors="replace"), *exported, *notified])


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        pytest.param("", ALL, marks=pytest.mark.attack("privacy", control=True), id="open"),
        pytest.param(RULES, set(), id="protected"),
        pytest.param(STRICT, set(), id="strict"),
    ],
)
def test_values_of_protected_fields_are_in_no_byte_that_leaves(tmp_path: Path, rules: str, expected: set[str]) -> None:
    beds = (
        '[streams.beds]\nfields = [{ name = "n" }]\n'
        f'source = {{ kind = "files", folder = "{tmp_path / "beds"}", poll_interval = "50 ms" }}\n'
    )
    with hook_server() as hook, LocalFleet(tmp_path) as fleet:
        toml = fleet.home / "fleet.toml"
        target = f'[notify.targets.hook]\nkind = "webhook"\nurl = "{hook.url}"\n[[notify.routes]]\ntargets = ["hook"]\n'
        toml.write_text(f'{toml.read_text()}\n{target}severity = "info"\n')
        hospital = Hospital(tmp_path, fleet, beds + rules)
        feed(hospital)
        if rules != STRICT:
            wait_until("label metrics", lambda: hospital.messages("quality"))
            wait_until("notifications", lambda: hook.posts)
        text = everything_that_leaves(hospital, hook)
        results = hospital.messages("results")
        kinds = {kind for (kind,) in fleet.query("SELECT DISTINCT kind FROM messages")}
    places = {value: text.find(value) for value in (*ALL, "61.7319")}
    shown = {value: text[max(0, at - 200) : at + 100] for value, at in places.items() if at >= 0}
    assert set(shown) == expected, shown
    listed = sum(len(json.dumps(body["columns"]["row"])) > 2 for body in results)
    if rules == STRICT:
        assert (listed, kinds & {"drift", "quality", "alerts"}) == (0, set())
    else:
        assert listed
        assert kinds >= {"drift", "quality", "alerts"}
    if rules == RULES:
        assert "patient=h:" in text
