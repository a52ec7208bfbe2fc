"""Rules for code that must also run where numpy's own integers and the C library's times have 32 bits, as on armv7l.

On 64-bit machines the mistakes are invisible: there `np.intp`, `int` and `np.int64` are one type. `scripts/test_arm`
runs the code itself.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INDICES = ROOT / "agent/outstation/foundation/indices.py"
# numpy casts their indices or counts to np.intp by the rule "safe".
SAFE_CASTS = {"repeat", "bincount", "take", "put", "choose"}
OF_ARRAYS = {"repeat", "take", "reduceat"}
# Types of C's long, of 32 bits there.
C_LONGS = {"int_", "uint", "long", "ulong"}


def problems(source: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of code that means something else on a 32-bit machine, and what to write there."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and _of_numpy(node) and node.attr in C_LONGS:
            yield node.lineno, f"np.{node.attr} has 32 bits there: np.int64"
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            if any(map(_is_untyped_range, (node.left, node.right))):
                yield node.lineno, "a product with np.arange overflows at 2**31 there: np.arange(…, dtype=np.int64)"
        elif isinstance(node, ast.Call):
            yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[tuple[int, str]]:
    if any(isinstance(k.value, ast.Name) and k.value.id == "int" for k in node.keywords if k.arg == "dtype"):
        yield node.lineno, "dtype=int has 32 bits there: np.int64"
    if not isinstance(node.func, ast.Attribute):
        return
    name, numpy = node.func.attr, _of_numpy(node.func)
    of_array = name in OF_ARRAYS and not (isinstance(node.func.value, ast.Name) and node.func.value.id == "itertools")
    if (name in SAFE_CASTS and numpy) or of_array:
        yield node.lineno, f"{name} raises TypeError for int64 there: agent/outstation/foundation/indices.py"
    place = {"astype": 0, "zeros": 1, "ones": 1, "empty": 1, "array": 1, "asarray": 1, "full": 2}.get(name)
    if place is not None and len(node.args) > place:
        kind = node.args[place]
        if isinstance(kind, ast.Name) and kind.id == "int":
            yield node.lineno, "int has 32 bits there: np.int64"
    if name in {"fromtimestamp", "utcfromtimestamp"} and (len(node.args) > 1 or node.keywords):
        yield node.lineno, "fromtimestamp ends in 2038 there: clock.to_datetime"


def _of_numpy(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in {"np", "numpy"}


def _is_untyped_range(node: ast.expr) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "arange"):
        return False
    numbers = [a for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, float)]
    return _of_numpy(node.func) and not numbers and not any(k.arg == "dtype" for k in node.keywords)


@pytest.mark.parametrize("folder", ["agent", "scripts/kit"])
def test_code_means_the_same_where_an_index_has_32_bits(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {problem}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != INDICES
        for line, problem in problems(path.read_text(encoding="utf-8"))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        "np.repeat(values, counts)",
        "values.repeat(counts)",
        "np.bincount(bins, minlength=3)",
        "rows.take(members, axis=0)",
        "np.add.reduceat(rows, starts)",
        "np.choose(i, rows)",
        "np.zeros(3, int)",
        "values.astype(int)",
        "np.array([], dtype=int)",
        "np.int_(3)",
        "step_us * np.arange(n)",
        "np.arange(n) * step_us",
        "datetime.fromtimestamp(t, UTC)",
        "datetime.fromtimestamp(t, tz=UTC)",
    ],
)
def test_each_mistake_is_recognized(line: str) -> None:
    assert len(list(problems(line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "itertools.repeat(1)",
        "queue.put(1)",
        "take(rows, members, axis=0)",
        "np.arange(n, dtype=np.int64) * step_us",
        "2 * np.pi * np.arange(1.0, n)",
        "values.astype(np.int64)",
        "np.zeros(3, np.int64)",
        "datetime.fromtimestamp(t)",
    ],
)
def test_what_is_right_is_left_alone(line: str) -> None:
    assert list(problems(line)) == []
