"""Feature file and a SPEC that refers to it."""

from __future__ import annotations

from pathlib import Path

from scripts.kit.bundles import Recipe, write_spec

FEATURES = """\
name = "motion"
version = "1.0.0"
fields = ["a", "b"]
max_gap_s = 0.5
derived = [
  { name = "a_mean", function = "mean", field = "a", rows = 5 },
  { name = "b_step", function = "difference", field = "b", rows = 3 },
  { name = "a_last", function = "last", field = "a", rows = 2 },
  { name = "day", function = "hour" },
  { name = "a_long", function = "mean", field = "a", rows = 40 },
]
"""
RECIPE = Recipe("regress", "classify_float32", fields=("a", "b"), output='names = ["x", "y", "z"]')
# In the order of the model's inputs.
COLUMNS = ("a_mean", "b_step", "a_last", "day_sin")


def write_feature_spec(folder: Path) -> Path:
    """Write a SPEC with a feature set of which the model takes four features, and all files that it names."""
    (folder / "motion.toml").write_text(FEATURES)
    spec = write_spec(folder, RECIPE)
    order = ", ".join(f'"{name}"' for name in COLUMNS)
    features = f'features = {{ file = "motion.toml", version = "1.0.0" }}\nfeature_order = [{order}]'
    text = spec.read_text()
    assert 'fields = ["a", "b"]' in text
    spec.write_text(text.replace('fields = ["a", "b"]', features))
    return spec
