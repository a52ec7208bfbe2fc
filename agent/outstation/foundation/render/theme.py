"""Colour themes: light, dark, and CSS variables for pages."""

from __future__ import annotations

import msgspec


class Theme(msgspec.Struct, frozen=True):
    """Colour theme. `series` colours suit the colour-blind (Okabe & Ito 2008, adapted to the background)."""

    paper: str
    panel: str
    ink: str
    muted: str
    grid: str
    reference: str
    reference_edge: str
    ok: str
    drift: str
    drift_band: str
    fault: str
    fault_band: str
    unknown: str
    limit: str
    series: tuple[str, ...]

    def state_color(self, state: str) -> str:
        return {"ok": self.ok, "drift": self.drift, "fault": self.fault}.get(state, self.unknown)


LIGHT_THEME = Theme(
    paper="#ffffff",
    panel="#f8fafc",
    ink="#0f172a",
    muted="#5b6779",
    grid="#e2e8f0",
    reference="#d5dce6",
    reference_edge="#94a3b8",
    ok="#0f9d6b",
    drift="#d97706",
    drift_band="#fde9c8",
    fault="#c0263a",
    fault_band="#f7cdd3",
    unknown="#8492a6",
    limit="#c0263a",
    series=("#1d6fd8", "#8b4fc4", "#0b8a7a", "#c2560c", "#b5377f", "#6b7a10"),
)
DARK_THEME = Theme(
    paper="#0d1420",
    panel="#141d2c",
    ink="#e8edf5",
    muted="#95a3b8",
    grid="#243044",
    reference="#334158",
    reference_edge="#64748b",
    ok="#34c795",
    drift="#f0a63a",
    drift_band="#43331a",
    fault="#f2707f",
    fault_band="#4a212b",
    unknown="#7688a1",
    limit="#f2707f",
    series=("#62a8ff", "#c394f5", "#3fcab6", "#f39a5d", "#f080bb", "#c3d24f"),
)
# For drawings within a page, which defines the variables: see `css_variables`.
PAGE_THEME = Theme(
    **{name: f"var(--{name.replace('_', '-')})" for name in LIGHT_THEME.__struct_fields__ if name != "series"},
    series=tuple(f"var(--series-{i})" for i in range(len(LIGHT_THEME.series))),
)


def css_variables(theme: Theme) -> str:
    """Return CSS that sets the variables of `PAGE_THEME` to the colours of `theme`."""
    plain = [
        f"--{name.replace('_', '-')}:{getattr(theme, name)}" for name in theme.__struct_fields__ if name != "series"
    ]
    return ";".join([*plain, *(f"--series-{i}:{color}" for i, color in enumerate(theme.series))])


def adaptive_css() -> str:
    """Return CSS that sets the variables of `PAGE_THEME` by the reader's colour scheme, light or dark."""
    light, dark = css_variables(LIGHT_THEME), css_variables(DARK_THEME)
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
