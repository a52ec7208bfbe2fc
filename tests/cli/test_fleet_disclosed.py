"""Command `fleet log disclosed`: rows are those of the signed message, are others, or are not proven."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.foundation.cli.commands import cli
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.wire import commitment
from outstation.protocol.wire.commitment import DisclosedJoin, Disclosure
from outstation.workbench.testing.messages import FLEET, MessageSender

NOW = "2026-11-24T22:20:00.000000Z"
KEY = commitment.encode_key(bytes(32))
AIR = DisclosedJoin(stream="air", rows=(5, 6), key=KEY, fields=[("t", "f32")], t=[1, 2], columns=[[0.5, None]])


def disclose(folder: Path, own: str, air: str, *, with_air: bool, is_replaced: bool = False) -> tuple[Result, Result]:
    """Return the answers, as text and as JSON, on rows of a message with these commitments; "" is none."""
    config = init_fleet(folder / FLEET, FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
    store, sender = FleetStore(config.fleet.db), MessageSender()
    store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
    joined = {"weather": {"stream": "air", "rows": [5, 6], "input": air}}
    message = sender.verify(sender.results(1, rows_at=(1, 2), input=own, joined=joined))
    assert list(store.ingest([Arrival(message)], [], NOW)) == ["new"]
    if is_replaced:
        event = sender.append("audit", event="secret replaced", summary="It was lost.", evidence={})
        store.ingest([Arrival(sender.verify(event))], [], NOW)
    store.close()
    shown = Disclosure(
        **{name: getattr(AIR, name) for name in ("key", "fields", "t", "columns")},
        rows=(1, 2),
        device=sender.device,
        log=sender.log,
        task=sender.task,
        joined={"weather": AIR} if with_air else {},
    )
    file = folder / "rows.json"
    file.write_bytes(msgspec.json.encode(shown))
    arguments = ["fleet", "disclosed", str(file), "--dir", str(folder / FLEET)]
    return CliRunner().invoke(cli, arguments), CliRunner().invoke(cli, [*arguments, "--json"])


@pytest.mark.parametrize(
    ("own", "air", "code", "verdicts", "lines"),
    [
        (AIR.commit(), AIR.commit(), 0, (True, True), ["are those of", "are those of"]),
        (AIR.commit(), "hmac-sha256:Ω", 1, (True, False), ["are those of", "are NOT those of"]),
        (AIR.commit(), "", 1, (True, None), ["are those of", "are not proven: its message 1 has no commitment"]),
        ("", AIR.commit(), 1, (None, True), ["are not proven: its message 1 has no commitment", "are those of"]),
        ("other", "", 1, (False, None), ["are NOT those of", "are not proven"]),
    ],
)
def test_rows_without_a_commitment_are_neither_proven_nor_refuted(
    tmp_path: Path, own: str, air: str, code: int, verdicts: tuple[bool | None, ...], lines: list[str]
) -> None:
    text, document = disclose(tmp_path, own, air, with_air=True)
    assert (text.exit_code, document.exit_code) == (code, code)
    printed = text.stdout.splitlines()
    assert len(printed) == 2
    assert all(part in line for part, line in zip(lines, printed, strict=True)), printed
    answer = json.loads(document.stdout)
    assert (answer["matches"], answer["joined"]["weather"]) == verdicts


def test_rows_under_a_secret_that_was_replaced_are_not_called_others(tmp_path: Path) -> None:
    text, document = disclose(tmp_path, "other", AIR.commit(), with_air=True, is_replaced=True)
    assert (text.exit_code, document.exit_code) == (1, 1)
    answer = json.loads(document.stdout)
    assert (answer["matches"], answer["joined"]["weather"]) == (None, True)
    assert f"cannot be verified: the device's secret was replaced at {answer['secret_replaced']}" in text.stdout


@pytest.mark.parametrize("air", [AIR.commit(), ""])
def test_the_hint_names_only_rows_that_a_commitment_can_prove(tmp_path: Path, air: str) -> None:
    text, document = disclose(tmp_path, AIR.commit(), air, with_air=False)
    assert (text.exit_code, document.exit_code) == (0, 0)
    assert ("disclose --joined" in text.stdout) is bool(air)
    assert ("No commitment proves the rows of weather." in text.stdout) is not bool(air)
    answer = json.loads(document.stdout)
    names = answer["joined_not_disclosed"], answer["joined_without_commitment"]
    assert names == ((["weather"], []) if air else ([], ["weather"]))
