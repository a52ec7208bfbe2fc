"""Command `outstation join`: join a fleet with the operator's answer to a request, or with an invitation."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from outstation.foundation.cli.options import PATH, json_option
from outstation.foundation.cli.output import echo, emit
from outstation.foundation.errors import UsageError

if TYPE_CHECKING:
    from outstation.device.bootstrap.joining import JoinPlan

# More than any code.
_MAX_CODE_CHARS = 1 << 16


@click.command(epilog="Example: outstation join pi-07.tar.gz --dir /etc/outstation")
@click.argument("enrolment", metavar="[FILE]", required=False, type=PATH)
@click.option("--code", help="Invitation of `fleet invite`, in place of FILE; - reads it from standard input.")
@click.option("--broker", "url", metavar="URL", help="With --code: address of the broker; default the invitation's.")
@click.option("--wait", "wait_s", metavar="SECONDS", default=600.0, show_default=True, type=click.FloatRange(1),
              help="With --code: how long to wait for the answer.")  # fmt: skip
@click.option("--dir", "folder", default=".", type=PATH, help="Folder of the config and keys.")
@click.option("--data-dir", help="Folder of the store, for a device without a config; default DIR/data.")
@click.option("--replace", is_flag=True, help="Replace files that differ; each is kept as NAME.before-join.")
@json_option
def join(
    enrolment: Path | None,
    code: str | None,
    url: str | None,
    wait_s: float,
    folder: Path,
    data_dir: str | None,
    replace: bool,
    as_json: bool,
) -> None:
    """Join a fleet with FILE, which `fleet enrol --bundle-out` made for this device, or with an invitation.

    With --code, the device makes its keys in DIR, asks over MQTT, and joins with the answer: no private key leaves it,
    and the broker can neither read the code nor forge the answer.

    Readings, results and drift references stay, and stored messages are sent to the fleet, too. A config that nobody
    changed is replaced. Of a changed one, the id, the fleet, [broker], [collector], [operators] and [updates] are
    replaced, and your streams, tasks and other sections stay. Killed at any moment, run it again.
    """
    from outstation.device.bootstrap import joining
    from outstation.device.cli.init import is_untouched

    if (enrolment is None) == (code is None):
        raise UsageError("give either FILE or --code")
    if enrolment is not None:
        _join(joining.plan(enrolment, folder, is_untouched, data_dir), replace, as_json)
        return
    from outstation.device.bootstrap import invited

    text = sys.stdin.read(_MAX_CODE_CHARS) if code == "-" else code or ""
    invitation, broker = invited.parse_code(text, url)
    # Before the operator's side lets it in.
    joining.require_stopped(folder)
    request, key = invited.make_request(folder, invitation.fleet, invitation.device, invitation.token)
    echo(f"{invitation.device} asks fleet {invitation.fleet} at {broker.shown_url}; thumbprint {key.kid}", err=True)
    answer = invited.ask(invitation, broker, request, wait_s)
    with tempfile.TemporaryDirectory(prefix="outstation-") as made:
        file = Path(made) / f"{invitation.device}.tar.gz"
        file.write_bytes(invited.read_answer(answer))
        plan = joining.plan(file, folder, is_untouched, data_dir)
    _join(plan, replace, as_json)
    if not invited.confirm(invitation, broker, answer):
        echo("The operator's side could not be told; the invitation stays open until it expires.", err=True)


def _join(plan: JoinPlan, replace: bool, as_json: bool) -> None:
    """Carry out a plan, and print what it did."""
    from outstation.device.bootstrap import joining

    folder = plan.folder
    if plan.replaced and not replace:
        _ask_to_replace(plan.folder, plan.replaced, plan.sections)
    moved = joining.apply(plan)
    document = {
        "file": str(folder / joining.CONFIG_FILE),
        "fleet": plan.fleet,
        "device": plan.device,
        "replaced": plan.replaced,
        "sections": plan.sections,
        "store_moved": moved,
    }
    lines = [f"{plan.device} joined fleet {plan.fleet}: {folder / joining.CONFIG_FILE}"]
    if plan.replaced:
        lines.append(f"Kept as *{joining.FORMER}: the former {', '.join(plan.replaced)}.")
    if moved:
        lines.append("Its readings and results stay; the next start sends its stored messages to the fleet.")
    lines.append(f"Next: outstation check -c {shlex.quote(str(folder / joining.CONFIG_FILE))}")
    emit(document, as_json, lambda: echo("\n".join(lines)))


def _ask_to_replace(folder: Path, replaced: list[str], sections: list[str]) -> None:
    """Ask whether files may be replaced. Raises UsageError if nobody can answer, or does not agree."""
    names = ", ".join(replaced)
    detail = f" (of the config: {', '.join(sections)}; the rest stays)" if sections else ""
    if not sys.stdin.isatty():
        raise UsageError(f"{folder}: {names} would be replaced{detail}; nothing was written; add --replace to agree")
    if not click.confirm(f"{folder}: replace {names}{detail}?", err=True):
        raise UsageError(f"{folder}: nothing was written")
