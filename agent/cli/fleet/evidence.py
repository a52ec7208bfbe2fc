"""`outstation fleet evidence`: write a signed evidence folder for auditors, and verify one."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent import clock, input_files
from agent.cli.fleet.common import db_option, fleet_option, open_for_reading, print_lines, progress_bar
from agent.cli.output import emit, json_option
from agent.errors import UsageError
from agent.wire import keys

if TYPE_CHECKING:
    from agent.fleet.evidence.make import EvidenceFolder

_PATH = click.Path(path_type=Path)


@click.group(
    "evidence",
    invoke_without_command=True,
    epilog="Example: outstation fleet evidence --out acme-2026-11 --evaluation exercise.json",
)
@click.option("--out", metavar="DIR", type=_PATH, help="The folder to create; it must not exist.")
@click.option("--at", metavar="TIME", help="Count open incidents up to this time; default the newest message.")
@click.option("--bundle", "bundles", multiple=True, metavar="BUNDLE", type=_PATH,
              help="Include its documents; published and running built-in bundles are always included.")  # fmt: skip
@click.option("--evaluation", "evaluations", multiple=True, metavar="FILE", type=_PATH,
              help="Output of `outstation model evaluate --json` for one of the bundles.")  # fmt: skip
@click.option("--publisher", "publishers", multiple=True, metavar="PUB",
              help="A key that signs bundles, or a file with it; that of built-in bundles is known.")  # fmt: skip
@click.option("--witness", "witnesses", multiple=True, metavar="FILE", type=_PATH,
              help="A head that a device signed (`outstation head --json`): include it.")  # fmt: skip
@db_option
@fleet_option
@json_option
@click.pass_context
def evidence(
    ctx: click.Context,
    out: Path | None,
    at: str | None,
    bundles: tuple[Path, ...],
    evaluations: tuple[Path, ...],
    publishers: tuple[str, ...],
    witnesses: tuple[Path, ...],
    db: str | None,
    folder: str | None,
    as_json: bool,
) -> None:
    """Write a signed folder with a report: what the fleet's models did, who decided it, and what is not known.

    Exit 1 if the audit of the database fails; the folder is written anyway, and says so.
    """
    if ctx.invoked_subcommand is not None:
        if out is not None:
            raise UsageError("--out writes a folder, and verify checks one; use one of them")
        return
    if out is None:
        raise UsageError("--out DIR is missing: a new folder; or: outstation fleet evidence verify DIR --key PUB")
    made = _make_folder(out, at, bundles, evaluations, publishers, witnesses, db, folder)
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
    emit(document, as_json, lambda: print_lines(*_summary_lines(document)))
    if not facts.audit["passed"]:
        sys.exit(1)


def _make_folder(
    out: Path,
    at: str | None,
    bundles: tuple[Path, ...],
    evaluations: tuple[Path, ...],
    publishers: tuple[str, ...],
    witnesses: tuple[Path, ...],
    db: str | None,
    folder: str | None,
) -> EvidenceFolder:
    from agent.fleet import config as fleet_config
    from agent.fleet.evidence.gather.bundles import read_evaluation
    from agent.model.bundle import builtin

    try:
        from agent.fleet.evidence.make import EvidenceSources, write_folder
    except ImportError as error:
        raise UsageError(f"{error}; the bill of materials needs: pip install 'outstation[fleet]'") from None
    try:
        at = None if at is None else clock.to_rfc3339(clock.parse_rfc3339(at))
    except ValueError:
        raise UsageError(f"--at {at!r}: write a time with its time zone, 2026-11-24T22:18:00Z") from None
    known = [*builtin.publisher_keys(), *(keys.load_public(text) for text in publishers)]
    evaluated = [read_evaluation(path) for path in evaluations]
    config, store = open_for_reading(folder, db)
    sources = EvidenceSources(
        fleet=config.fleet.name,
        fleet_dir=fleet_config.find_folder(folder),
        operator=keys.load_private(Path(config.operator.key_file)),
        operators=fleet_config.load_trusted_keys(config),
        collector=keys.load_public_for(Path(config.collector.key_file)),
        publishers=known,
        bundles=bundles,
        evaluations=evaluated,
        witnesses=[data for _, data in _read_witnesses(witnesses)],
    )
    with progress_bar("gathering", store.count_messages()) as advance:
        return write_folder(store, sources, out, at, advance)


def _read_witnesses(paths: tuple[Path, ...]) -> list[tuple[str, bytes]]:
    from agent.wire import log_head

    files = []
    for path in paths:
        try:
            with input_files.open_regular(path) as file:
                files.append((str(path), file.read(log_head.MAX_BYTES + 1)))
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    return files


def _summary_lines(document: dict[str, Any]) -> Iterable[str]:
    yield (
        f"{document['out']}: {document['files']} files, of {document['messages']} messages, {document['incidents']} "
        f"incidents, {document['decisions']} decisions and {document['bundles']} bundles as of {document['as_of']}"
    )
    for name, n in document["omitted"].items():
        yield f"  omitted: {n} {name} above the limit of a folder"
    if document["unverified"]:
        yield f"  {document['unverified']} stored messages do not verify; their contents are left out"
    if not document["passed"]:
        yield "  the audit FAILED: the page lists the problems; see `outstation fleet audit`"
    yield f"Read it: {document['out']}/index.html"
    yield f"Check it anywhere: outstation fleet evidence verify {document['out']} --key OPERATOR.pub"


@evidence.command("verify", epilog="Example: outstation fleet evidence verify acme-2026-11 --key operator.key.pub")
@click.argument("folder", metavar="DIR", type=_PATH)
@click.option("--key", "key_texts", multiple=True, metavar="PUB", help="The operator's public key, or a file with it.")
@click.option("--witness", "witnesses", multiple=True, metavar="FILE", type=_PATH,
              help="A head that you got from a device (`outstation head --json`), not from the operator.")  # fmt: skip
@json_option
def verify(folder: Path, key_texts: tuple[str, ...], witnesses: tuple[Path, ...], as_json: bool) -> None:
    """Verify a folder with public keys alone: no database, no config, no network. Exit 1 if it does not verify."""
    from agent.fleet.evidence.verify.verify import verify as run

    if not key_texts:
        raise UsageError(
            "--key PUB is missing: the public key of the operator who signed the folder, obtained independently of the "
            "folder (operator.key.pub in the fleet's folder)"
        )
    report = run(folder, [keys.load_public(text) for text in key_texts], _read_witnesses(witnesses)).to_dict()
    emit(report, as_json, lambda: print_lines(*_verification_lines(report)))
    if not report["ok"]:
        sys.exit(1)


def _verification_lines(report: dict[str, Any]) -> Iterable[str]:
    if report["signer"]:
        yield f"signed by {report['signer']}"
    if report["fleet"]:
        yield (
            f"fleet {report['fleet']} as of {report['as_of']}: {report['files']} files, {report['messages']} messages, "
            f"{report['decisions']} decisions, {report['comparisons']} comparisons, {report['bundles']} bundles, "
            f"{report['signatures']} signatures in the repository's metadata"
        )
        later = f", {report['later_witnesses']} of them from later" if report["later_witnesses"] else ""
        yield (
            f"hash chains of {report['chained_messages']} messages with {report['gaps']} gaps, "
            f"{report['witnesses']} heads that devices signed{later}"
        )
    for entry in report["problems"][:50]:
        yield f"  {entry['file']}: {entry['problem']}"
    if report["problem_count"] > 50:
        yield f"  and {report['problem_count'] - 50} more; --json lists up to 500"
    yield "VERIFIED" if report["ok"] else "WRONG: do not rely on this folder"
