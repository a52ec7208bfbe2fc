"""Bundles of recipes, packed and loaded once in a test run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agent.model import activation
from agent.model.activation import LoadedBundle
from scripts.kit.bundles import KEY, Recipe, packed

Load = Callable[[Recipe], LoadedBundle]


@pytest.fixture(scope="session")
def active(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Return a function that packs, verifies, probes and loads a recipe's bundle once."""
    loaded: dict[Recipe, LoadedBundle] = {}

    def load(recipe: Recipe) -> LoadedBundle:
        if recipe not in loaded:
            loaded[recipe] = activation.activate(packed(tmp_path_factory.mktemp(recipe.model), recipe), [KEY.public])
        return loaded[recipe]

    return load
