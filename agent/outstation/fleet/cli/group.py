"""`outstation fleet`: the commands of the machine that collects. A new command is a module, and its name here."""

from __future__ import annotations

import click

from outstation.foundation.cli.groups import SentenceGroup

_HEADINGS = {
    "Start": ("init", "collect", "dashboard", "simulate"),
    "Devices": ("invite", "enrol", "devices", "command"),
    "Models": ("publish", "repository", "rollout", "drift"),
    "Incidents": ("alerts",),
    "Labels": ("labels", "dataset"),
    "Evidence": ("audit", "log", "evidence"),
    "Keys and data": ("keys", "db"),
}
_PLACES = {
    "alerts": "outstation.fleet.cli.reports:alerts",
    "audit": "outstation.fleet.cli.reports:audit",
    "collect": "outstation.fleet.cli.collect:collect",
    "command": "outstation.fleet.cli.command:command",
    "dashboard": "outstation.fleet.cli.dashboard.serve:dashboard",
    "dataset": "outstation.fleet.cli.data.dataset:dataset",
    "db": "outstation.fleet.cli.data.database:database_group",
    "devices": "outstation.fleet.cli.reports:devices",
    "drift": "outstation.fleet.cli.drift:drift",
    "enrol": "outstation.fleet.cli.enrolment.enrol:enrol",
    "evidence": "outstation.evidence.cli:evidence",
    "init": "outstation.fleet.cli.enrolment.enrol:init",
    "invite": "outstation.fleet.cli.enrolment.invite:invite",
    "keys": "outstation.fleet.cli.keys:keys",
    "labels": "outstation.fleet.cli.group:labels",
    "log": "outstation.fleet.cli.group:log",
    "publish": "outstation.fleet.cli.repository:publish",
    "repository": "outstation.fleet.cli.repository:repository",
    "rollout": "outstation.fleet.cli.rollout:rollout",
    "simulate": "outstation.workbench.cli.simulate:simulate",
}
# Names of one word, for hands and for the cron lines and scripts of operators.
_SHORT_FORMS = {
    **{name: ("devices", name) for name in ("cost", "enrol-list", "remove", "renew", "revoke", "token", "watch")},
    **{name: ("keys", name) for name in ("collector", "homeassistant", "reissue", "viewer")},
    **{name: ("db", name) for name in ("export", "migrate", "prune", "rebuild", "sql")},
    **{name: ("log", name) for name in ("disclosed", "gaps")},
    "accept-log": ("log", "accept"),
    "label": ("labels", "add"),
    "label-next": ("labels", "next"),
    "notify": ("alerts", "notify"),
    "samples": ("dataset", "samples"),
    "user": ("dashboard", "user"),
    "verdict": ("labels", "verdict"),
}


@click.group(cls=SentenceGroup, places=_PLACES, headings=_HEADINGS, short_forms=_SHORT_FORMS)
def fleet() -> None:
    """Run the fleet's side: enrol devices, collect, watch, command, audit."""


@click.group(
    cls=SentenceGroup,
    places={
        "add": "outstation.fleet.cli.labelling.label:add",
        "next": "outstation.fleet.cli.labelling.suggest:suggest",
        "verdict": "outstation.fleet.cli.labelling.verdict:verdict",
    },
)
def labels() -> None:
    """Add true labels and people's verdicts, and choose the results to label next."""


@click.group(
    cls=SentenceGroup,
    places={
        "accept": "outstation.fleet.cli.reports:accept_log",
        "disclosed": "outstation.fleet.cli.disclosed:disclosed",
        "gaps": "outstation.fleet.cli.reports:gaps",
    },
)
def log() -> None:
    """Look for missing messages and clones in message logs, and verify rows that a device discloses."""
