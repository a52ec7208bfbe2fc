"""Attack run: every test marked `attack`, with a table of what held.

A control is the same attack without the defence: it must succeed, which shows that the attack is a real one.
"""

from __future__ import annotations

import re
import sys
from collections import Counter

import click
import pytest

from scripts.attacks import transcript

_PREFIX = re.compile(r"^test_")


class AttackReport:
    """Pytest plugin that selects attacks by area and records how each ended."""

    def __init__(self, areas: tuple[str, ...], *, list_only: bool) -> None:
        self._areas, self._list_only = areas, list_only
        self._attacks: dict[str, tuple[str, str, bool]] = {}
        self.outcomes: dict[tuple[str, str, bool], str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        selected = []
        for item in items:
            marker = item.get_closest_marker("attack")
            if marker is None or (self._areas and marker.args[0] not in self._areas):
                continue
            name = _PREFIX.sub("", item.name).replace("_", " ")
            self._attacks[item.nodeid] = (marker.args[0], name, bool(marker.kwargs.get("control")))
            selected.append(item)
        if self._list_only:
            for area, name, is_control in sorted(self._attacks.values()):
                click.echo(f"{area:<14} {'control' if is_control else 'attack':<8} {name}")
            selected = []
        items[:] = selected

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            attack = self._attacks[report.nodeid]
            earlier = self.outcomes.get(attack, "passed")
            self.outcomes[attack] = report.outcome if earlier == "passed" else earlier

    def print_table(self) -> None:
        columns = ("attacks", "held", "broken", "skipped", "controls")
        click.echo(f"\n{'area':<14}" + "".join(f"{column:>10}" for column in columns))
        totals: Counter[str] = Counter()
        for area in sorted({area for area, _, _ in self.outcomes}):
            ends, controls = self._count(area, is_control=False), self._count(area, is_control=True)
            numbers = [ends.total(), ends["passed"], ends["failed"], ends["skipped"]]
            click.echo(
                f"{area:<14}" + "".join(f"{n:>10}" for n in numbers) + f"{controls['passed']:>8}/{controls.total()}"
            )
            totals += ends
        numbers = [totals.total(), totals["passed"], totals["failed"], totals["skipped"]]
        click.echo(f"{'all':<14}" + "".join(f"{n:>10}" for n in numbers))
        for (area, name, is_control), end in sorted(self.outcomes.items()):
            if end == "failed":
                click.echo(f"{'the control did not break' if is_control else 'broken'}: {area}: {name}")

    def _count(self, area: str, *, is_control: bool) -> Counter[str]:
        return Counter(
            end for (where, _, control), end in self.outcomes.items() if (where, control) == (area, is_control)
        )


@click.command()
@click.argument("areas", nargs=-1)
@click.option("--list", "list_only", is_flag=True, help="List the attacks, and run none.")
@click.option("--transcript", "with_parties", is_flag=True, help="Let each party of a small fleet try what it can.")
def main(areas: tuple[str, ...], *, list_only: bool, with_parties: bool) -> None:
    """Run the attacks of AREAS, or of all, against real processes."""
    if with_parties:
        sys.exit(transcript.main())
    report = AttackReport(areas, list_only=list_only)
    code = pytest.main(["tests", "-m", "attack", "-q", "--no-header", "-p", "no:cacheprovider"], plugins=[report])
    if list_only:
        return
    report.print_table()
    sys.exit(int(code))


if __name__ == "__main__":
    main()
