"""Matrices without BLAS: products and pseudo-inverses as NumPy's, dependent columns included, and no call of BLAS."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outstation.ml import drift
from outstation.ml.drift.numeric import control_limits, matrices

FOLDER = Path(drift.__file__).parent
BLAS = {"linalg", "dot", "vdot", "inner", "matmul", "tensordot"}
# Products of whole numbers, exact in any order, and only without the kernel.
EXACT = {"correlation.py"}


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
@settings(deadline=None, max_examples=50)
def test_products_equal_those_of_numpy(seed: int, inner: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(rows, inner)), rng.normal(size=(inner, columns))
    np.testing.assert_allclose(matrices.multiply(left, right), left @ right, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(0, 60), st.floats(-6, 6))
@settings(deadline=None, max_examples=50)
def test_pseudo_inverses_equal_those_of_numpy(seed: int, columns: int, more: int, scale: float) -> None:
    design = np.random.default_rng(seed).normal(size=(columns + more, columns)) * 10.0**scale
    inverse, expected = matrices.invert(design), np.linalg.pinv(design)
    np.testing.assert_allclose(inverse, expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())


def test_columns_that_depend_on_others_get_the_shortest_solution() -> None:
    rng = np.random.default_rng(1)
    design = rng.normal(size=(50, 4))
    design = np.concatenate([design, design[:, :1] - design[:, 1:2], np.zeros((50, 1))], axis=1)
    np.testing.assert_allclose(matrices.invert(design), np.linalg.pinv(design), atol=1e-10)


def test_quadrature_is_exact_for_moments_of_the_standard_normal() -> None:
    nodes, weights = control_limits._NODES, control_limits._WEIGHTS
    for power, moment in ((0, 1.0), (1, 0.0), (2, 1.0), (4, 3.0), (6, 15.0), (28, 213458046676875.0)):
        assert (weights * nodes**power).sum() == pytest.approx(moment, rel=1e-9, abs=1e-12)


def test_no_module_of_drift_calls_blas() -> None:
    """Its buffers would be the largest part of a device's memory for drift."""
    users = set()
    for file in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_product = isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)
            if is_product or (isinstance(node, ast.Attribute) and node.attr in BLAS):
                users.add(file.name)
    assert users == EXACT
