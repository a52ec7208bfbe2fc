"""`outstation fleet`: the commands of the machine that collects. A new command is a module, and its name here."""

from __future__ import annotations

import importlib

import click

from outstation.fleet.cli.collect import collect, collector, homeassistant, reissue
from outstation.fleet.cli.command import command, remove, revoke
from outstation.fleet.cli.disclosed import disclosed
from outstation.fleet.cli.drift import drift
from outstation.fleet.cli.keys import keys
from outstation.fleet.cli.reports import accept_log, alerts, audit, devices, gaps
from outstation.fleet.cli.repository import publish, repository
from outstation.fleet.cli.rollout import rollout
from outstation.fleet.cli.watch import viewer, watch
from outstation.foundation.cli.groups import SentenceGroup

# Commands in folders below this one, which import what commands here share.
_BELOW = {
    "evidence": "outstation.evidence.cli:evidence",
    "simulate": "outstation.workbench.cli.simulate:simulate",
    "init": "outstation.fleet.cli.enrolment.enrol:init",
    "token": "outstation.fleet.cli.enrolment.enrol:token",
    "invite": "outstation.fleet.cli.enrolment.invite:invite",
    "enrol": "outstation.fleet.cli.enrolment.enrol:enrol",
    "enrol-list": "outstation.fleet.cli.enrolment.enrol:enrol_list",
    "renew": "outstation.fleet.cli.enrolment.enrol:renew",
    "cost": "outstation.fleet.cli.cost:cost",
    "db": "outstation.fleet.cli.data.database:database_group",
    "dataset": "outstation.fleet.cli.data.dataset:dataset",
    "label": "outstation.fleet.cli.labelling.label:label",
    "label-next": "outstation.fleet.cli.labelling.suggest:label_next",
    "verdict": "outstation.fleet.cli.labelling.verdict:verdict",
    "export": "outstation.fleet.cli.data.export:export",
    "migrate": "outstation.fleet.cli.data.migrate:migrate",
    "prune": "outstation.fleet.cli.data.prune:prune",
    "samples": "outstation.fleet.cli.data.samples:samples",
    "sql": "outstation.fleet.cli.data.export:sql",
    "dashboard": "outstation.fleet.cli.dashboard.serve:dashboard",
    "notify": "outstation.fleet.cli.notify.commands:notify",
    "user": "outstation.fleet.cli.dashboard.user:user",
}


class _FleetGroup(SentenceGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_BELOW})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _BELOW:
            return super().get_command(ctx, cmd_name)
        module, _, name = _BELOW[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.group(cls=_FleetGroup)
def fleet() -> None:
    """Run the fleet's side: enrol devices, collect, watch, command, audit."""


for _subcommand in (
    *(devices, collect, collector, homeassistant, reissue, viewer, watch),
    *(alerts, gaps, audit, disclosed, drift, command, revoke, remove, accept_log, publish, repository, keys),
    *(rollout,),
):
    fleet.add_command(_subcommand)
