"""`outstation fleet evidence`: write a signed evidence folder for auditors, and verify one."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from outstation.fleet.cli.common import (
    database_options,
    is_without_command,
    open_for_reading,
    print_lines,
    progress_bar,
)
from outstation.foundation import clock, input_files
from outstation.foundation.cli.options import DURATION, PATH, json_option
from outstation.foundation.cli.output import emit
from outstation.foundation.errors import MessageRefused, UsageError
from outstation.foundation.extras import install_command
from outstation.foundation.text import mask_password, pluralize
from outstation.protocol.wire import keys

if TYPE_CHECKING:
    from outstation.evidence.make import EvidenceFolder
    from outstation.evidence.timestamps.stamp import Stamp
    from outstation.evidence.timestamps.token import TimestampTrust
    from outstation.fleet.config import FleetConfig
    from outstation.protocol.wire.keys import SigningKey

_MAX_KEY_BYTES = 65_536
_timestamp_ca = click.option(
    "--timestamp-ca", "ca", metavar="FILE", type=PATH,
    help="PEM file with the root certificate of the time-stamping authority, obtained independently.",
)  # fmt: skip
_timestamp_policy = click.option(
    "--timestamp-policy", "policy", metavar="OID", default="", help="Accept time stamps under this policy only."
)


@click.group(
    "evidence",
    invoke_without_command=True,
    epilog="Example: outstation fleet evidence --out acme-2026-11 --evaluation exercise.json",
)
@click.option("--out", metavar="DIR", type=PATH, help="The folder to create; it must not exist.")
@click.option("--at", metavar="TIME", help="Count open incidents up to this time; default the newest message.")
@click.option("--bundle", "bundles", multiple=True, metavar="BUNDLE", type=PATH,
              help="Include its documents; published and running built-in bundles are always included.")  # fmt: skip
@click.option("--evaluation", "evaluations", multiple=True, metavar="FILE", type=PATH,
              help="Output of `outstation model evaluate --json` for one of the bundles.")  # fmt: skip
@click.option("--publisher", "publishers", multiple=True, metavar="PUB",
              help="A key that signs bundles, or a file with it; that of built-in bundles is known.")  # fmt: skip
@click.option("--witness", "witnesses", multiple=True, metavar="FILE", type=PATH,
              help="Include a head that a device signed (`outstation head --json`), or a time stamp (.tsr) "
                   "of `fleet evidence stamp`.")  # fmt: skip
@click.option("--operator-key", metavar="FILE", type=PATH,
              help="Key that signs the folder, - for standard input; default that of fleet.toml.")  # fmt: skip
@database_options
@click.pass_context
def evidence(ctx: click.Context, /, out: Path | None, as_json: bool, **sources: Any) -> None:
    """Write a signed folder with a report: what the fleet's models did, who decided it, and what is not known.

    Exit 1 if the audit of the database fails; the folder is written anyway, and says so.
    """
    if not is_without_command(ctx, sources["home"]):
        if out is not None:
            raise UsageError(f"--out before {ctx.invoked_subcommand} would write a folder; leave it out")
        return
    if out is None:
        raise UsageError("--out DIR is missing: a new folder; or: outstation fleet evidence verify DIR --operator PUB")
    made = _make_folder(out, **sources)
    facts = made.facts
    document = {
        "out": str(out),
        "fleet": facts.fleet,
        "as_of": facts.as_of,
        "passed": facts.audit["passed"],
        "files": len(made.files) + 2,
        "messages": facts.message_count,
        "incidents": sum(facts.incident_counts.values()),
        "decisions": sum(facts.event_counts.values()),
        "bundles": len(facts.bundles.cards),
        "omitted": {name: n for name, n in sorted(facts.omitted.items()) if n},
        "unverified": facts.unverified,
        "signer": next(key.kid for key in facts.keys if key.role == "operator"),
    }
    emit(document, as_json, lambda: print_lines(*_summary_lines(document)), passed=facts.audit["passed"])


def _make_folder(
    out: Path,
    at: str | None,
    bundles: tuple[Path, ...],
    evaluations: tuple[Path, ...],
    publishers: tuple[str, ...],
    witnesses: tuple[Path, ...],
    operator_key: Path | None,
    db: str | None,
    home: Path,
) -> EvidenceFolder:
    from outstation.evidence.gather.bundles import read_evaluation
    from outstation.fleet import config as fleet_config
    from outstation.ml.model.bundle import builtin

    try:
        from outstation.evidence.make import EvidenceSources, write_folder
    except ImportError as error:
        raise UsageError(f"{error}; an evidence folder needs: {install_command('fleet')}") from None
    try:
        at = None if at is None else clock.to_rfc3339(clock.parse_rfc3339(at))
    except ValueError:
        raise UsageError(f"--at {at!r}: write a time with its time zone, 2026-11-24T22:18:00Z") from None
    known = [*builtin.publisher_keys(), *(keys.load_public(text) for text in publishers)]
    evaluated = [read_evaluation(path) for path in evaluations]
    heads, stamps = _read_witnesses(witnesses)
    for stamp in stamps:
        _check_stamp(stamp)
    config, store = open_for_reading(home, db)
    operator, trusted = _load_operator(operator_key, config), fleet_config.load_trusted_keys(config)
    sources = EvidenceSources(
        fleet=config.fleet.name,
        fleet_dir=home,
        operator=operator,
        # The first one signs the folder.
        operators=[operator.public, *(key for key in trusted if key.kid != operator.public.kid)],
        collector=keys.load_public_for(Path(config.collector.key_file)),
        publishers=known,
        bundles=bundles,
        evaluations=evaluated,
        heads=[data for _, data in heads],
        stamps=stamps,
    )
    with progress_bar("gathering", store.count_messages()) as advance:
        return write_folder(store, sources, out, at, advance)


def _load_operator(file: Path | None, config: FleetConfig) -> SigningKey:
    if file is None:
        return keys.load_private(Path(config.operator.key_file))
    if str(file) == "-":
        return keys.parse_private(sys.stdin.buffer.read(_MAX_KEY_BYTES), "standard input")
    return keys.load_private(file)


def _read_witnesses(paths: tuple[Path, ...]) -> tuple[list[tuple[str, bytes]], list[Stamp]]:
    """Return heads (name, content) and time stamps. Raises UsageError."""
    from outstation.evidence.timestamps import stamp
    from outstation.protocol.documents import log_head

    heads = [
        (str(path), input_files.read_input(path, log_head.MAX_BYTES)) for path in paths if path.suffix != stamp.RESPONSE
    ]
    return heads, [stamp.read(path) for path in paths if path.suffix == stamp.RESPONSE]


def _check_stamp(stamp: Stamp, trust: TimestampTrust | None = None) -> str:
    """Return the time of a stamp that answers its request. Raises UsageError."""
    token = _import_token()
    try:
        content = token.check(stamp) if trust is None else token.verify(stamp, trust)
    except MessageRefused as refused:
        raise UsageError(f"{stamp.name}: {refused}") from None
    return clock.to_rfc3339(content.time_us)


def _load_trust(path: Path | None, policy: str) -> TimestampTrust | None:
    if path is None:
        if policy:
            raise UsageError("--timestamp-policy needs --timestamp-ca: without it no time stamp is verified")
        return None
    trust: TimestampTrust = _import_token().load_trust(path, policy)
    return trust


def _import_token() -> ModuleType:
    try:
        from outstation.evidence.timestamps import token
    except ImportError as error:
        raise UsageError(f"{error}; time stamps need: {install_command('fleet')}") from None
    return token


@evidence.command(
    "stamp", epilog="Example: outstation fleet evidence stamp --out acme-2026-11 --timestamp-url http://tsa.example.com"
)
@click.option("--out", metavar="NAME", type=PATH, required=True,
              help="Write NAME.json (the heads), NAME.tsq (the request) and NAME.tsr (the time stamp).")  # fmt: skip
@click.option("--timestamp-url", "url", metavar="URL", help="Send the request to this authority, and write NAME.tsr.")
@_timestamp_ca
@_timestamp_policy
@click.option("--timeout", "timeout_s", metavar="S", default=30.0, type=click.FloatRange(min=0, min_open=True),
              help="Wait this long for the authority; default 30.")  # fmt: skip
@database_options
def stamp(
    out: Path,
    url: str | None,
    ca: Path | None,
    policy: str,
    timeout_s: float,
    db: str | None,
    home: Path,
    as_json: bool,
) -> None:
    """Let a time-stamping authority (RFC 3161) date the newest message of every log, and so all messages before it.

    Without --timestamp-url, send NAME.tsq to an authority yourself and save its response as NAME.tsr. Give the three
    files to the auditor at once: they show later what the database held at that time.
    """
    from outstation.evidence.timestamps import authority, log_heads
    from outstation.evidence.timestamps import stamp as files
    from outstation.fleet.database.evidence import EvidenceQueries

    files.require_new(out)
    trust = _load_trust(ca, policy)
    config, store = open_for_reading(home, db)
    with store.snapshot() as snapshot:
        heads = log_heads.encode(config.fleet.name, EvidenceQueries(store, snapshot).stream_heads())
    request = _import_token().create_request(heads)
    document: dict[str, Any] = {"out": str(out), "fleet": config.fleet.name, "time": None}
    document["logs"] = len(log_heads.decode(heads).heads)
    responses = []
    if url is not None:
        responses.append(authority.fetch(url, request, timeout_s))
        stamped = files.Stamp(f"--timestamp-url {mask_password(url)}", heads, request, *responses)
        document["time"] = _check_stamp(stamped, trust)
    files.write(out, heads, request, *responses)
    emit(document, as_json, lambda: print_lines(*_stamp_lines(document)))


def _stamp_lines(document: dict[str, Any]) -> Iterable[str]:
    out, heads = document["out"], f"the heads of {document['logs']} logs of fleet {document['fleet']}"
    if document["time"] is None:
        yield f"{out}.json: {heads}; {out}.tsq: the request for a time stamp of it"
        yield "Send it, and save the response under the same name:"
        yield f"  curl -H 'Content-Type: application/timestamp-query' --data-binary @{out}.tsq -o {out}.tsr URL"
    else:
        yield f"{out}.tsr: a time stamp of {document['time']} for {heads}"
    yield f"Give the auditor {out}.json, {out}.tsq and {out}.tsr now: evidence verify --witness {out}.tsr"


def _summary_lines(document: dict[str, Any]) -> Iterable[str]:
    yield (
        f"{document['out']}: {document['files']} files, of {pluralize(document['messages'], 'message')}, "
        f"{pluralize(document['incidents'], 'incident')}, {pluralize(document['decisions'], 'decision')} and "
        f"{pluralize(document['bundles'], 'bundle')} as of {document['as_of']}"
    )
    for name, n in document["omitted"].items():
        yield f"  omitted: {n} {name} above the limit of a folder"
    if document["unverified"]:
        yield f"  {document['unverified']} stored messages do not verify; their contents are left out"
    if not document["passed"]:
        yield "  the audit FAILED: the page lists the problems; see `outstation fleet audit`"
    yield f"Read it: {document['out']}/index.html"
    yield f"Check it anywhere: outstation fleet evidence verify {document['out']} --operator OPERATOR.pub"


@evidence.command("verify", epilog="Example: outstation fleet evidence verify acme-2026-11 --operator operator.key.pub")
@click.argument("folder", metavar="DIR", type=PATH)
@click.option(
    "--operator", "key_texts", multiple=True, metavar="PUB", help="The operator's public key, or a file with it."
)
@click.option("--witness", "witnesses", multiple=True, metavar="FILE", type=PATH,
              help="A head that you got from a device (`outstation head --json`), not from the operator; or a time "
                   "stamp (.tsr, with .json and .tsq beside it) that you got before the folder.")  # fmt: skip
@_timestamp_ca
@_timestamp_policy
@click.option("--max-delay", "max_delay_s", type=DURATION, default="7d",
              help="With a time stamp: how late a device's message may come; default 7d.")  # fmt: skip
@json_option
def verify(
    folder: Path,
    key_texts: tuple[str, ...],
    witnesses: tuple[Path, ...],
    ca: Path | None,
    policy: str,
    max_delay_s: float,
    as_json: bool,
) -> None:
    """Verify a folder with public keys alone: no database, no config, no network. Exit 1 if it does not verify."""
    from outstation.evidence.verify.stamps import Witnesses
    from outstation.evidence.verify.verify import verify as run

    if not key_texts:
        raise UsageError(
            "--operator PUB is missing: the public key of the operator who signed the folder, not obtained from the "
            "folder (operator.key.pub in the fleet's folder)"
        )
    heads, stamps = _read_witnesses(witnesses)
    if stamps and ca is None:
        raise UsageError(f"{stamps[0].name}: name the authority's root certificate: --timestamp-ca FILE")
    brought = Witnesses(heads, stamps, _load_trust(ca, policy), max_delay_s)
    report = run(folder, [keys.load_public(text) for text in key_texts], brought).to_dict()
    emit(report, as_json, lambda: print_lines(*_verification_lines(report)), passed=report["ok"])


def _verification_lines(report: dict[str, Any]) -> Iterable[str]:
    if report["signer"]:
        yield f"signed by {report['signer']}"
    if report["fleet"]:
        yield (
            f"fleet {report['fleet']} as of {report['as_of']}: {report['files']} files, {report['messages']} messages, "
            f"{report['decisions']} decisions, {report['comparisons']} comparisons, {report['bundles']} bundles, "
            f"{report['signatures']} signatures in the repository's metadata"
        )
        newest = f", the newest of {report['stamped_at']}" if report["stamps"] else ""
        yield (
            f"hash chains of {report['chained_messages']} messages with {report['gaps']} gaps, "
            f"{report['witnesses']} heads that devices signed, {report['stamps']} time stamps{newest}"
        )
        if report["unchecked_stamps"]:
            yield f"not checked: {report['unchecked_stamps']} time stamps; name their authority: --timestamp-ca FILE"
    for entry in report["problems"][:50]:
        yield f"  {entry['file']}: {entry['problem']}"
    if report["problem_count"] > 50:
        yield f"  and {report['problem_count'] - 50} more; --json lists up to 500"
    yield "VERIFIED" if report["ok"] else "WRONG: do not rely on this folder"
