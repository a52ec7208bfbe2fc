"""Config of a simulated device: a replay as its stream, and the scenario's task on it."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.config.sources import ReplaySource
from agent.simulate.plan import SimulatedSite, SimulationPlan


def stream_and_task_toml(plan: SimulationPlan, site: SimulatedSite) -> str:
    """Return the sections that follow those from enrolment."""
    scenario = plan.scenario
    fields = ", ".join(f'{{ name = "{name}", unit = "{unit}" }}' for name, unit in scenario.fields)
    source = ReplaySource(
        file=str(scenario.file),
        subject=site.subject,
        seed=site.seed,
        speed=plan.speed,
        rows=plan.rows,
        faults=list(site.faults.faults),
        scenes=list(site.faults.scenes),
        skip=scenario.skip_rows,
    )
    return (
        '\n[buffer]\ncommit_every = "500 ms"\n'
        f"\n[streams.{scenario.stream}]\nfields = [{fields}]\n"
        f"source = {toml_value(msgspec.to_builtins(source))}\n"
        f'\n[tasks.{scenario.name}]\nstream = "{scenario.stream}"\nbundle = "{scenario.bundle}"\n'
        f'schedule = "every 1 s"\nlearn_windows = {scenario.learn_windows}\n'
    )


def toml_value(value: Any) -> str:
    """Return a value as TOML, with members that are None left out."""
    if isinstance(value, dict):
        members = (f"{key} = {toml_value(member)}" for key, member in value.items() if member is not None)
        return "{ " + ", ".join(members) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return msgspec.json.encode(value).decode() if isinstance(value, str) else repr(value)
