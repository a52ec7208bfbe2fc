"""Command `outstation fleet log disclosed`: compares rows that a device disclosed with its signed message."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from outstation.fleet.cli.common import fleet_options, open_for_reading, print_lines
from outstation.foundation import decoders, input_files
from outstation.foundation.cli.options import PATH
from outstation.foundation.cli.output import emit
from outstation.foundation.errors import UsageError
from outstation.protocol.wire import verification
from outstation.protocol.wire.commitment import SECRET_REPLACED, DisclosedJoin, Disclosure
from outstation.protocol.wire.messages import AuditPayload, ResultsPayload

if TYPE_CHECKING:
    from outstation.fleet.database.store import FleetStore


@click.command("disclosed", epilog="Example: outstation fleet log disclosed rows.json")
@click.argument("file", type=PATH)
@fleet_options
def disclosed(file: Path, home: Path, as_json: bool) -> None:
    """Compare the rows in FILE, made by `outstation disclose`, with the message that the device signed.

    `outstation fleet audit` verifies the signatures of stored messages. Exit 1 if the rows are others, or if no
    commitment of the message proves them. Where the device's secret was replaced since, nobody can tell.
    """
    disclosure = _read(file)
    _, store = open_for_reading(home, device=disclosure.device)
    try:
        seqs = find_messages(disclosure, store.evidence(disclosure.device))
    except UsageError as problem:
        raise UsageError(f"{file}: {problem}") from None
    try:
        matches = _compare(disclosure.commit(), [body.input for _, body in seqs])
        joined = {
            name: compare_joined(name, rows, [body for _, body in seqs]) for name, rows in disclosure.joined.items()
        }
    except ValueError as problem:
        raise UsageError(f"{file}: {problem}; make it again with `outstation disclose`") from None
    replaced = None if matches and False not in joined.values() else _find_replacement(store, disclosure, seqs)
    if replaced is not None:
        matches, joined = matches or None, {name: proven or None for name, proven in joined.items()}
    # The message names rows of inputs that the file does not show.
    named = {name: each for _, body in seqs for name, each in body.joined.items() if name not in joined}
    document = {
        "device": disclosure.device,
        "log": disclosure.log,
        "seq": seqs[0][0],
        "task": disclosure.task,
        "rows": disclosure.rows,
        "matches": matches,
        "secret_replaced": replaced,
        "joined": joined,
        "joined_not_disclosed": sorted(name for name, each in named.items() if each.input),
        "joined_without_commitment": sorted(name for name, each in named.items() if not each.input),
    }
    passed = bool(matches) and all(joined.values())
    emit(document, as_json, lambda: print_lines(*_verdict_lines(disclosure, document)), passed=passed)


def _find_replacement(
    store: FleetStore, disclosure: Disclosure, seqs: Sequence[tuple[int, ResultsPayload]]
) -> str | None:
    """Return when the device's secret was first replaced after the messages; None if it never was."""
    replaced = []
    last, latest = max(seq for seq, _ in seqs), max(body.time for _, body in seqs)
    for *_, payload, _jws in store.audit_messages(disclosure.device, f'"{SECRET_REPLACED}"'.encode()):
        event = verification.decode(payload)
        if isinstance(event, AuditPayload) and event.event == SECRET_REPLACED:
            is_later = event.seq > last if event.log == seqs[-1][1].log else event.time > latest
            replaced += [event.time] if is_later else []
    return min(replaced, default=None)


def compare_joined(name: str, rows: DisclosedJoin, bodies: Sequence[ResultsPayload]) -> bool | None:
    """Return True if these rows are those that the message commits to for the input `name`.

    None if it names these rows without a commitment. Raises ValueError.
    """
    computed = rows.commit()
    claims = [body.joined.get(name) for body in bodies]
    proofs = [each.input for each in claims if each and (each.stream, each.rows) == (rows.stream, rows.rows)]
    return _compare(computed, proofs) if len(proofs) == len(claims) else False


def _compare(computed: str, proofs: Sequence[str]) -> bool | None:
    """Return True if all commitments are the computed one; None if there is none."""
    made = [proof.encode() for proof in proofs if proof]
    return all(hmac.compare_digest(computed.encode(), proof) for proof in made) if made else None


def _verdict_lines(disclosure: Disclosure, document: Mapping[str, Any]) -> Iterator[str]:
    def line(subject: str, rows: tuple[int, int], matches: bool | None) -> str:
        verdict = f"{'are' if matches else 'are NOT'} those of its message {seq}"
        if matches is None:
            verdict = f"are not proven: its message {seq} has no commitment to them"
            if document["secret_replaced"]:
                verdict = f"cannot be verified: the device's secret was replaced at {document['secret_replaced']}"
        return f"{disclosure.device}, {disclosure.task}: {subject}rows {rows[0]} to {rows[1]} {verdict}"

    seq = document["seq"]
    yield line("", disclosure.rows, document["matches"])
    for name, rows in disclosure.joined.items():
        yield line(f"input {name}, stream {rows.stream}: ", rows.rows, document["joined"][name])
    if undisclosed := document["joined_not_disclosed"]:
        yield f"Missing here: rows of {', '.join(undisclosed)}; `outstation disclose --joined NAME=A-B` shows them."
    if unproven := document["joined_without_commitment"]:
        yield f"No commitment proves the rows of {', '.join(unproven)}."


def find_messages(disclosure: Disclosure, entries: Iterable[Sequence[Any]]) -> list[tuple[int, ResultsPayload]]:
    """Return seq and body of the messages whose rows are disclosed. Raises UsageError if there is none.

    A reissued message has the commitment of the log in which it was first written.
    """
    matching, other_logs = [], set()
    for _, log, seq, kind, _, payload, *_ in entries:
        if kind != "results":
            continue
        body = verification.decode(payload)
        if isinstance(body, ResultsPayload) and (body.task, body.rows) == (disclosure.task, disclosure.rows):
            written_in = body.reissued.first_log if body.reissued else str(log)
            if written_in == disclosure.log:
                matching.append((int(seq), body))
            elif log == disclosure.log:
                other_logs.add(written_in)
    if matching:
        return matching
    first, last = disclosure.rows
    if other_logs:
        raise UsageError(
            f"the message with rows {first} to {last} was first written in another log, whose commitment it has; "
            f"run `outstation disclose {disclosure.task} --rows {first}-{last} --log {min(other_logs)}`"
        )
    raise UsageError(
        f"no message of task {disclosure.task!r} in log {disclosure.log} covers exactly rows {first} to {last}; "
        "take them from `rows` of a message"
    )


def _read(file: Path) -> Disclosure:
    try:
        return decoders.from_json(input_files.read_input(file), Disclosure)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: no disclosure of rows ({error}); make it with `outstation disclose`") from None
