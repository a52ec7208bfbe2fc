"""Bundles of recipes, packed and loaded once in a test run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import pytest

if TYPE_CHECKING:
    from agent.model.activation import LoadedBundle
    from scripts.kit.bundles import Recipe

Load: TypeAlias = "Callable[[Recipe], LoadedBundle]"


@pytest.fixture(scope="session")
def active(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Return a function that packs, verifies, probes and loads a recipe's bundle once."""
    # Not at the top: most tests run no model.
    from agent.model import activation
    from scripts.kit.bundles import KEY, packed

    loaded: dict[Recipe, LoadedBundle] = {}

    def load(recipe: Recipe) -> LoadedBundle:
        if recipe not in loaded:
            loaded[recipe] = activation.activate(packed(tmp_path_factory.mktemp(recipe.model), recipe), [KEY.public])
        return loaded[recipe]

    return load
