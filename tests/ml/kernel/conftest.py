"""Fixture of the compiled kernel's tests."""

from __future__ import annotations

import pytest

from outstation.ml.kernel import library
from outstation.ml.kernel.library import Library


@pytest.fixture(scope="session")
def compiled() -> Library:
    loaded = library.kernel()
    if loaded is None:
        pytest.skip(f"the compiled kernel is missing: {library.describe()}")
    return loaded
