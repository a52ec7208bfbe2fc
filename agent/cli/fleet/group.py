"""`outstation fleet`: the commands of the machine that collects. A new command is a module, and its name here."""

from __future__ import annotations

import importlib

import click

from agent.cli.fleet.collect import collect, collector, homeassistant, reissue
from agent.cli.fleet.command import command, remove, revoke
from agent.cli.fleet.disclosed import disclosed
from agent.cli.fleet.drift import drift
from agent.cli.fleet.evidence import evidence
from agent.cli.fleet.keys import keys
from agent.cli.fleet.reports import accept_log, alerts, audit, devices, gaps
from agent.cli.fleet.repository import publish, repository
from agent.cli.fleet.rollout import rollout
from agent.cli.fleet.simulate import simulate
from agent.cli.fleet.watch import viewer, watch
from agent.cli.groups import SentenceGroup

# Commands in folders below this one, which import what commands here share.
_BELOW = {
    "init": "agent.cli.fleet.enrolment.enrol:init",
    "token": "agent.cli.fleet.enrolment.enrol:token",
    "invite": "agent.cli.fleet.enrolment.invite:invite",
    "enrol": "agent.cli.fleet.enrolment.enrol:enrol",
    "enrol-list": "agent.cli.fleet.enrolment.enrol:enrol_list",
    "renew": "agent.cli.fleet.enrolment.enrol:renew",
    "cost": "agent.cli.fleet.cost:cost",
    "db": "agent.cli.database.fleet:database_group",
    "dataset": "agent.cli.fleet.data.dataset:dataset",
    "label": "agent.cli.fleet.labelling.label:label",
    "label-next": "agent.cli.fleet.labelling.suggest:label_next",
    "verdict": "agent.cli.fleet.labelling.verdict:verdict",
    "export": "agent.cli.fleet.data.export:export",
    "migrate": "agent.cli.fleet.data.migrate:migrate",
    "prune": "agent.cli.fleet.data.prune:prune",
    "samples": "agent.cli.fleet.data.samples:samples",
    "sql": "agent.cli.fleet.data.export:sql",
    "dashboard": "agent.cli.fleet.dashboard.serve:dashboard",
    "notify": "agent.cli.fleet.notify.commands:notify",
    "user": "agent.cli.fleet.dashboard.user:user",
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
    *(rollout, evidence, simulate),
):
    fleet.add_command(_subcommand)
