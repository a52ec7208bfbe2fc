"""small.json as a table and a picture: the marked part of models/README.md, and docs/images/small.svg.

python show_small.py    # both again, from the figures that are there
"""

from __future__ import annotations

import json
import statistics
import textwrap
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
    "parameters",
    "bytes",
    "accuracy",
    "less float32's",
    "µs one by one",
    "µs in batches",
    "of",
    "CPU s for 1000",
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
    lines += [line(one) for one in found["variants"]]
    return "\n".join([f"![{ALT}](../docs/images/small.svg)", "", *lines, "", told(found), "", seeds(found["seeds"])])


def line(one: dict[str, Any]) -> str:
    value, low, high = one["accuracy"]
    cells = (
        f"**{one['name']}**" if "shipped" in one["name"] else one["name"],
        f"{one['parameters']:,}",
        f"{one['bytes']:,}",
        over(f"{value:.3f}", f"{low:.3f} to {high:.3f}"),
        over(*changed(one["change"])) if one["change"] else "",
        over(decimals(one["us_one"]), f"{decimals(one['times_one'])} ×"),
        over(decimals(one["us_best"]), f"{decimals(one['times_best'])} ×"),
        f"{one['batch']}",
        f"{one['cpu_s_of_1000']:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def over(figure: str, more: str) -> str:
    """One above the other, neither of them broken."""
    return f"{figure}<br>({more})".replace(" ", "\N{NO-BREAK SPACE}")


def changed(change: list[float]) -> tuple[str, str]:
    value, low, high = (signed(x) for x in change)
    return value, f"{low} to {high}"


def told(found: dict[str, Any]) -> str:
    return paragraph(
        f"Accuracy: {found['windows']} windows of subjects 8, 9 and 10, whom no network here has seen. Intervals:",
        f"{found['intervals']}; those of the difference are paired.",
        f"Times of a window: {found['machine']}, shared with other work; {found['runtime']}, one thread, models in",
        f"turns, {found['rounds']} rounds, the median of each round's fastest call, with the quantization of what goes",
        "in and out; × of float32 in the same round; batches of the fastest size. CPU seconds for 1000 windows:",
        "from readings to scores in those batches, of which scaling",
        f"and scores are {found['rest_us']:g} µs a window, whatever the model.",
    )


def seeds(found: dict[str, Any]) -> str:
    teacher, alone, distilled = (found["accuracy"][name] for name in ("teacher", "alone", "distilled"))
    gains = [d - a for a, d in zip(alone, distilled, strict=True)]
    mean, half = statistics.mean(gains), T_4 * statistics.stdev(gains) / len(gains) ** 0.5
    return paragraph(
        f"As float, a figure for each seed. Teacher: {listed(teacher)}. Small network alone: {listed(alone)};",
        f"distilled: {listed(distilled)}.",
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
