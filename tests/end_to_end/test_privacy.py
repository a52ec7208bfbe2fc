"""Privacy: unique values planted in every raw field, label, slice and category, sought in every byte that leaves.

A real daemon sends to a real broker and collector; the search covers the collector's database, the journals of both,
reports, and evidence. A control with the least count switched off finds the values, so the search is known to see.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outstation.protocol.client import Client
from outstation.workbench.testing.fleet import LocalFleet
from outstation.workbench.testing.patience import wait_until
from scripts.kit.bundles import CLASSIFY, KEY, packed
from tests.kit.commands import call_outstation

pytestmark = pytest.mark.attack("privacy")

ROWS, LABELS, WINDOW = 240, 160, 20
# f32 values whose digits nothing else has: the only readings of an optional field in their drift windows.
PLANTED = {25: 0.7351129, 65: -0.6482917, 130: 1.3579246}
REJECTED = 98765.4321
PATIENTS = ("patient-zq7", "patient-xw9")
T0 = time.time() - 3600


class Hospital:
    """A fleet with one device whose rows come from its socket."""

    def __init__(self, folder: Path, fleet: LocalFleet, privacy: str) -> None:
        # What the intake answers to a producer.
        self.fleet, self.folder, self.answer = fleet, folder, ""
        packed(folder, CLASSIFY)
        fields = ", ".join(
            [
                '{ name = "a", max = 1000.0 }',
                '{ name = "b", optional = true }',
                '{ name = "c" }, { name = "d" }, { name = "weight", optional = true }',
                '{ name = "patient", type = "category" }',
            ]
        )
        self.device = fleet.add_device("ward-1").append_config(
            f'{privacy}\n[buffer]\ncommit_every = "50 ms"\n[publishers]\nkeys = ["{KEY.public.text}"]\n'
            f"[streams.ward]\nfields = [{fields}]\n"
            f'[tasks.tiny]\nstream = "ward"\nbundle = "{folder / "bundle"}"\nschedule = "every 200 ms"\n'
            'slices = ["patient", { field = "weight", edges = [70.0] }]\nlearn_windows = 20\n'
        )
        fleet.broker.start()
        fleet.collector.start()
        self.device.start_and_wait()

    def feed(self) -> None:
        values = CLASSIFY.rows(ROWS)
        with Client(self.device.data_dir / "intake.sock", name="nurse") as client:
            for i, row in enumerate(values.astype(float).tolist()):
                optional = PLANTED.get(i)
                # One patient has one row, another two: both are far below the least count.
                who = PATIENTS[0] if i == 30 else PATIENTS[1] if i in (50, 90) else f"ward {i % 2}"
                client.send(
                    "ward", t=T0 + i, a=row[0], b=optional, c=row[2], d=row[3], weight=optional, patient=who
                )  # fmt: skip
            client.send("ward", t=T0 + ROWS, a=REJECTED, b=None, c=0.0, d=0.0, weight=None, patient="ward 0")
            answer = client.flush()
            assert len(answer.rejected) == 1
            self.answer = str(answer.rejected)
            wait_until("results", lambda: self.fleet.last_result_row("ward-1", "tiny") == ROWS)
            for row in range(1, LABELS + 1):
                client.label("tiny", ("left", "right", "rest")[row % 3], row=row)
            client.flush()
        wait_until("label metrics", lambda: self.messages("quality"))

    def messages(self, kind: str) -> list[dict[str, Any]]:
        rows = self.fleet.query("SELECT payload FROM messages WHERE kind = ? ORDER BY seq", kind)
        return [json.loads(payload) for (payload,) in rows]

    def run(self, *command: str) -> list[bytes]:
        done = call_outstation(*command)
        assert done.returncode in (0, 1), done.stderr
        return [done.stdout.encode(), done.stderr.encode()]

    def everything(self, *, local: bool = True) -> bytes:
        """Return every byte that was published, stored by the collector, logged, reported or put into evidence.

        `local`: also what the device shows on its own screen.
        """
        out, plot = self.folder / "evidence", self.folder / "drift.svg"
        parts = [self.answer.encode()]
        for command in (
            ["evidence", "--out", str(out)],
            ["audit", "--json"],
            *(["drift", *form] for form in ([], ["--json"], ["--plot", str(plot)])),
            *([name, *form] for name in ("alerts", "devices", "gaps") for form in ([], ["--json"])),
            ["alerts", "--all"],
            ["rollout", "status", "--json"],
            ["watch", "--raw", "--seconds", "1"],
            # The device publishes its status in the reply.
            ["command", "ward-1", "report", "--json"],
        ):
            parts += self.run("fleet", *command, "--dir", str(self.fleet.home))
        for form in ([], ["--json"]) if local else ():
            parts += self.run("status", *form, "-c", str(self.device.config))
        parts.append(plot.read_bytes())
        self.fleet.collector.stop()
        parts += [path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()]
        database = Path(self.fleet.config.fleet.db)
        parts += [path.read_bytes() for path in database.parent.glob(f"{database.name}*")]
        parts += [self.device.log.read_bytes(), self.fleet.collector.log.read_bytes()]
        # What the collector read, without the database's pages around it.
        parts += [payload for (payload,) in self.fleet.query("SELECT payload FROM messages")]
        return b"\n".join(parts)


def planted(published: bytes) -> set[str]:
    """Return the planted values among the bytes."""
    numbers = {f"{abs(value):.7f}"[:7] for value in (*PLANTED.values(), REJECTED)}
    return {text for text in (*numbers, *PATIENTS) if text.encode() in published}


@pytest.mark.parametrize("protected", [True, pytest.param(False, marks=pytest.mark.attack("privacy", control=True))])
def test_planted_readings_and_texts_are_in_no_byte_that_leaves(tmp_path: Path, protected: bool) -> None:
    privacy = "" if protected else "[privacy]\nmin_count = 1\nvalues_in_logs = true\n"
    with LocalFleet(tmp_path) as fleet:
        hospital = Hospital(tmp_path, fleet, privacy)
        hospital.feed()
        drift, quality = hospital.messages("drift"), hospital.messages("quality")
        assert len(drift) > 2
        assert quality
        disclosed = disclose(hospital)
        leaked = planted(hospital.everything())
        if not protected:
            # The control: each of them leaves where the owner asked for it.
            assert leaked >= {"0.73511", "0.64829", "1.35792", "98765.4", *PATIENTS}
            return
        assert leaked == set()
        for body in drift:
            for field in body["features"].values():
                check_cells([field["below"], *field["counts"], field["above"]])
            check_cells(body["output"]["counts"].values())
        for body in quality:
            assert all(metric["n"] >= 10 or not metric["n"] for metric in body["metrics"])
            check_cells(body["labels"]["classes"].values())
        # An auditor is shown the rows of one message, and only on request.
        assert disclosed == (0, 1)


def check_cells(counts: Any) -> None:
    assert all(n == 0 or n >= 10 for n in counts), counts


def disclose(hospital: Hospital) -> tuple[int, int]:
    """Return the exit codes of a check of disclosed rows, and of the same rows with one value changed."""
    first, last = hospital.messages("results")[0]["rows"]
    shown = call_outstation("disclose", "tiny", "--rows", f"{first}-{last}", "-c", str(hospital.device.config))
    assert shown.returncode == 0, shown.stderr
    codes = []
    for change in (False, True):
        document = json.loads(shown.stdout)
        if change:
            document["columns"][0][0] = float(np.float32(document["columns"][0][0]) + np.float32(0.5))
        file = hospital.folder / f"rows-{change}.json"
        file.write_text(json.dumps(document))
        done = call_outstation("fleet", "disclosed", str(file), "--json", "--dir", str(hospital.fleet.home))
        assert json.loads(done.stdout)["matches"] is not change
        codes.append(done.returncode)
        file.unlink()
    return codes[0], codes[1]
