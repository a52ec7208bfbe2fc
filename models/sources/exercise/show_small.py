"""small.json as a table and a picture: the marked part of models/README.md, and docs/images/small.svg.

python show_small.py    # both again, from the figures that are there
"""

from __future__ import annotations

import json
import statistics
import textwrap
from itertools import groupby
from pathlib import Path
from typing import Any

import draw_small
from draw_small import decimals

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
DATA = HERE / "small.json"
README = ROOT / "models" / "README.md"
PICTURE = ROOT / "docs" / "images" / "small.svg"
BEGIN, END = "<!-- small: begin; scripts/build_models --compare writes what stands here -->", "<!-- small: end -->"
T_4 = 2.776  # Student's t, 97.5 %, 4 degrees of freedom: five seeds

HEAD = (
    "",
    "bytes",
    "accuracy, 95 %",
    "less float32's",
    "µs a window, one by one",
    "in the best batch",
    "CPU s for 1000 windows",
)
ALT = "Size, accuracy with its interval and time of a window, a row for each model of the table below"


def main() -> None:
    write(json.loads(DATA.read_text(encoding="utf-8")))


def write(found: dict[str, Any]) -> None:
    PICTURE.write_text(draw_small.picture(found), encoding="utf-8")
    README.write_text(replaced(README.read_text(encoding="utf-8"), section(found)), encoding="utf-8")


def replaced(text: str, part: str) -> str:
    """`text` with `part` between the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{README}: the marks are gone, so nothing was written; put back {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def section(found: dict[str, Any]) -> str:
    """Markdown between the marks."""
    lines = [f"| {' | '.join(HEAD)} |", f"|---|{'---:|' * (len(HEAD) - 1)}"]
    for (network, parameters), some in groupby(found["variants"], lambda one: (one["network"], one["parameters"])):
        lines.append(f"| *{network}, {parameters:,} parameters* |{' |' * (len(HEAD) - 1)}")
        lines += [line(one) for one in some]
    return "\n".join([f"![{ALT}](../docs/images/small.svg)", "", *lines, "", told(found), "", seeds(found["seeds"])])


def line(one: dict[str, Any]) -> str:
    value, low, high = one["accuracy"]
    name = f"**{one['name']}**" if "shipped" in one["name"] else one["name"]
    cells = (
        name,
        f"{one['bytes']:,}",
        f"{value:.3f} ({low:.3f} to {high:.3f})",
        changed(one["change"]),
        f"{decimals(one['us_one'])} ({decimals(one['times_one'])} ×)",
        f"{decimals(one['us_best'])} ({decimals(one['times_best'])} ×), {one['batch']}",
        f"{one['cpu_s_of_1000']:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def changed(change: list[float] | None) -> str:
    if change is None:
        return ""
    value, low, high = (signed(x) for x in change)
    return f"{value} ({low} to {high})"


def told(found: dict[str, Any]) -> str:
    return paragraph(
        f"Accuracy: {found['windows']} windows of subjects 8, 9 and 10, whom no network here has seen. Intervals:",
        f"{found['intervals']}; those of the difference are paired.",
        f"Times: {found['machine']}, shared with other work; {found['runtime']}, one thread, models in turns,",
        f"{found['rounds']} rounds, the median of each round's fastest call, with the quantization of what goes in and",
        "out; × of float32 in the same round. CPU seconds: from readings to scores in the best batch, of which scaling",
        f"and scores are {found['rest_us']:g} µs a window, whatever the model.",
    )


def seeds(found: dict[str, Any]) -> str:
    alone, distilled = found["accuracy"]["alone"], found["accuracy"]["distilled"]
    gains = [d - a for a, d in zip(alone, distilled, strict=True)]
    mean, half = statistics.mean(gains), T_4 * statistics.stdev(gains) / len(gains) ** 0.5
    return paragraph(
        f"The small network as float, a figure for each seed. Alone: {listed(alone)}. Distilled: {listed(distilled)}.",
        f"Distilled it is better with {sum(gain > 0 for gain in gains)} of {len(gains)} seeds, by {signed(mean)} on",
        f"average (95 % {signed(mean - half)} to {signed(mean + half)}, paired t over seeds, on these three people).",
    )


def paragraph(*parts: str) -> str:
    return textwrap.fill(" ".join(parts), 120, break_long_words=False, break_on_hyphens=False)


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−") if round(value, 3) else "0.000"


def listed(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    main()
