"""`outstation fleet`: the commands of the machine that collects. A new command is a module, and its name here."""

from __future__ import annotations

import click

from agent.cli.fleet.collect import collect, collector
from agent.cli.fleet.command import command, revoke
from agent.cli.fleet.data.export import export, sql
from agent.cli.fleet.disclosed import disclosed
from agent.cli.fleet.drift import drift
from agent.cli.fleet.enrol import enrol, init, token
from agent.cli.fleet.evidence import evidence
from agent.cli.fleet.keys import keys
from agent.cli.fleet.label import label
from agent.cli.fleet.reports import accept_log, alerts, audit, devices, gaps
from agent.cli.fleet.repository import publish, repository
from agent.cli.fleet.rollout import rollout
from agent.cli.fleet.simulate import simulate
from agent.cli.fleet.watch import watch


@click.group()
def fleet() -> None:
    """Run the fleet's side: enrol devices, collect, watch, command, audit."""


for _subcommand in (
    *(init, token, enrol, devices, collect, collector, watch, alerts, gaps, audit, disclosed, drift, label, command),
    *(revoke, accept_log, publish, repository, keys, rollout, evidence, export, sql, simulate),
):
    fleet.add_command(_subcommand)
