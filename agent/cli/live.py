"""Live table of the demo."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agent.simulate.plan import SimulationPlan

_STATE_COLORS = {"ok": "green", "drift": "bold yellow", "fault": "bold red", "insufficient": "dim"}
_STATE_LABELS = {"insufficient": "learning its site"}


def show(views: Iterable[list[dict[str, Any]]], plan: SimulationPlan, broker: str) -> None:
    """Draw each view over the last one, in a terminal only."""
    console = Console()
    if not console.is_terminal:
        for _ in views:
            pass
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for view in views:
            table = Table(box=box.SIMPLE_HEAD, title=f"{len(plan.sites)} devices over {broker}", title_justify="left")
            for name in ("device", "", "rows", "drift windows", "results", "verified"):
                table.add_column(name, justify="right" if name not in ("device", "") else "left")
            table.add_column("drift")
            alerts = []
            for row in view:
                done = ProgressBar(total=plan.rows, completed=row["rows"], width=16)
                numbers = [f"{row[name]:,}" for name in ("rows", "windows", "results", "messages")]
                state = row["drift"] or "insufficient"
                table.add_row(
                    row["device"], done, *numbers, Text(_STATE_LABELS.get(state, state), _STATE_COLORS.get(state, ""))
                )
                alerts += [Text(f"{row['device']}  {sentence}") for sentence in row["open"]]
            if not view:
                table.add_row(Text("starting …", "dim"))
            live.update(Group(table, *alerts[-8:]), refresh=True)
